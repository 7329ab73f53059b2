"""Starts the Triton kernel: tiles, descriptors, one launch a kind of head. Tensors on the CPU run where Triton interprets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import e, log2
from typing import Any, Literal

import torch
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from reelquant.ops.architecture import Architecture, architecture, current_stream, launching
from reelquant.ops.band_attention.kernel import band_attention_kernel
from reelquant.ops.band_attention.reference import Correction, heads_of_kind
from reelquant.tokens import TokenLayout

Load = Literal["tma", "pointers"]


@dataclass(frozen=True)
class Tile:
    """How a program is cut; every value is compiled in."""

    rows: int
    columns: int
    warps: int
    stages: int
    shared_kib: int = 0
    """Shared memory of a program, at most, of all that one kernel does with this tile; a test compiles it."""


TILES = {64: Tile(128, 128, 8, 3, shared_kib=113), 128: Tile(128, 128, 8, 3, shared_kib=225)}
"""Head size -> tile for Hopper, the fastest of five measured."""

SMALL_TILE = Tile(128, 64, 8, 2, shared_kib=98)
"""For all other GPUs, with `pointers`: less than 99 KiB of shared memory for both head sizes."""


def band_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kinds: str,
    layout: TokenLayout,
    width: int,
    corrections: Sequence[Correction] = (),
    out: Tensor | None = None,
    tile: Tile | None = None,
    load: Load | None = None,
) -> Tensor:
    """See `op.band_attention`, which checks; `tile` and `load` stand in for what is chosen by device and strides."""
    out = new_output(q) if out is None else out
    _launch((q, k, v), (out, None), kinds, layout, width=width, corrections=corrections, tile=tile, load=load)
    return out


def dense_and_band_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kinds: str,
    layout: TokenLayout,
    width: int,
    tile: Tile | None = None,
    load: Load | None = None,
) -> tuple[Tensor, Tensor]:
    """See `op.dense_and_band_attention`: one pass, the band and the text first, then what is left."""
    band, dense = new_output(q), new_output(q)
    _launch((q, k, v), (band, dense), kinds, layout, width=width, corrections=(), tile=tile, load=load)
    return dense, band


def new_output(q: Tensor) -> Tensor:
    """`[H, L, D]`, the heads of one token together: what the next layer reads as `[L, H D]` without a copy."""
    heads, tokens, head_dim = q.shape
    return q.new_empty(tokens, heads, head_dim).transpose(0, 1)


def _launch(
    qkv: tuple[Tensor, Tensor, Tensor],
    outs: tuple[Tensor, Tensor | None],
    kinds: str,
    layout: TokenLayout,
    *,
    width: int,
    corrections: Sequence[Correction],
    tile: Tile | None,
    load: Load | None,
) -> None:
    q = qkv[0]
    if layout.num_frames == 1 or width >= layout.num_video:
        kinds = "s" * len(kinds)
    cut = tile or choose_tile(architecture(q.device), q.shape[2])
    with launching(q, cut.shared_kib):
        for kind in sorted(set(kinds)):
            frames = layout.num_frames if kind == "t" else 1
            way = load or _load(qkv, frames, cut)
            heads = heads_of_kind(kinds, kind, torch.int32, q.device, current_stream(q.device))
            blocks = cdiv(layout.num_video, cut.rows) + cdiv(layout.num_text, cut.rows)
            arguments = _arguments(qkv, outs, corrections, layout=layout, frames=frames, cut=cut, way=way)
            band_attention_kernel[(len(heads) * blocks,)](
                heads=heads,
                num_heads=len(heads),
                width=min(width, layout.num_video),
                num_warps=cut.warps,
                num_stages=cut.stages,
                **arguments,
            )


def _arguments(
    qkv: tuple[Tensor, Tensor, Tensor],
    outs: tuple[Tensor, Tensor | None],
    corrections: Sequence[Correction],
    *,
    layout: TokenLayout,
    frames: int,
    cut: Tile,
    way: Load,
) -> dict[str, Any]:
    """Of the kernel, all that does not depend on the heads."""
    q, k, v = qkv
    out, dense = outs
    places = layout.height * layout.width
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "k_box": k, "v_box": v, "out": out, "dense_out": dense}
    if dense is None:
        named["dense_out"] = dense = out
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out), ("dense", dense)):
        named[f"{name}_head"], named[f"{name}_stride"] = x.stride(0), x.stride(1)
    for name, x in (("k", k), ("v", v)):
        inside = x.stride(0) < x.stride(1)
        named[f"{name.upper()}_INSIDE"] = inside
        if way == "tma":
            named[name] = descriptor(x.transpose(0, 1) if inside else x, 0 if inside else 1, (cut.columns,))
            box = named[name]
            if frames > 1:
                grid = x[:, : layout.num_video].unflatten(1, (frames, places))
                grid = grid.movedim(0, 2) if inside else grid
                box = descriptor(grid, 0 if inside else 1, (frames, cut.columns // frames))
            named[f"{name}_box"] = box
    named |= correction_arguments(q, corrections)
    return named | {
        "num_video": layout.num_video,
        "num_text": layout.num_text,
        "places": places if frames > 1 else layout.num_video,
        "scale": q.shape[2] ** -0.5 * log2(e),
        "FRAMES": frames,
        "ROWS": cut.rows,
        "COLUMNS": cut.columns,
        "HEAD_DIM": q.shape[2],
        "LOAD": way,
        "BOTH": outs[1] is not None,
    }


def correction_arguments(q: Tensor, corrections: Sequence[Correction]) -> dict[str, Any]:
    """Of a kernel that adds up to two corrections by `attention_rows.write_rows`."""
    named: dict[str, Any] = {}
    kept = [correction for correction in corrections if correction.scale != 0]
    for letter, term in zip("ab", [*kept, None, None], strict=False):
        rows = q if term is None else term.rows
        named[f"rows_{letter}"], named[f"rows_{letter}_head"], named[f"rows_{letter}_stride"] = (
            rows,
            rows.stride(0),
            rows.stride(1),
        )
        named[f"scales_{letter}"] = None if term is None else term.row_scale
        named[f"directions_{letter}"] = q if term is None else (term.directions * term.scale).to(q.dtype).contiguous()
        named[f"RANK_{letter.upper()}"] = 0 if term is None else rows.shape[2]
    return named


def descriptor(x: Tensor, axis: int, block: tuple[int, ...]) -> TensorDescriptor:
    """For `tma` loads of `block` tokens from dimension `axis` on, of one head: `[..., D]` -> boxes `[.., *block, .., D]`."""
    shape = [1] * x.ndim
    shape[axis : axis + len(block)] = block
    shape[-1] = x.shape[-1]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape)


def choose_tile(found: Architecture, head_dim: int) -> Tile:
    """The default of Hopper, and for other GPUs the one that fits all."""
    return TILES[head_dim] if found.has_wgmma else SMALL_TILE


def _load(qkv: tuple[Tensor, Tensor, Tensor], frames: int, cut: Tile) -> Load:
    """`tma` where `takes_tma` and the frames fill a box."""
    boxed = frames & (frames - 1) == 0 and frames <= cut.columns
    return "tma" if boxed and takes_tma(*qkv[1:]) else "pointers"


def takes_tma(*tensors: Tensor) -> bool:
    """Whether the tiles are Hopper's, made for its tensor memory accelerator, and the strides of these `[H, L, D]` suit it."""
    found = architecture(tensors[0].device)
    if not (found.has_tma and found.has_wgmma):
        return False
    return all(
        x.data_ptr() % 16 == 0 and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
        for x in tensors
    )
