"""Band attention: checks, and the choice of an implementation.

| implementation | where | memory |
|---|---|---|
| `reference` | any device | O(L D) and one mask of a tile |
| `flex` | CUDA, through torch's FlexAttention, compiled once a head size, for any length | O(L D) |
| `triton` | CUDA from compute capability 8.0 on, bf16 and fp16, head size 64 or 128, no gradient | the result |

`auto` takes `triton` where it can, then `flex`, then `reference`; where the band leaves everything, torch's dense attention.

With a `precision` other than `full`, `ops/eight_bit_attention` computes all of it: implementations and errors stand there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from reelquant.ops.band_attention.reference import (
    SCALED_TOKENS,
    Correction,
    band_attention_reference,
    corrected,
    dense_and_band_reference,
)
from reelquant.ops.band_attention.reference import dense_attention as full_dense_attention
from reelquant.ops.eight_bit_attention.op import (
    eight_bit_attention,
    eight_bit_dense_and_band,
    quantize_keys_values,
)
from reelquant.ops.implementation import Implementation as EightBitImplementation
from reelquant.ops.implementation import takes_triton
from reelquant.settings.attention import Precision
from reelquant.tokens import TokenLayout

__all__ = ["Correction", "Implementation", "Precision", "band_attention", "dense_and_band_attention", "dense_attention"]

Implementation = Literal["auto", "reference", "flex", "triton"]

FLEX_TOKENS = 4096
"""From here on `auto` takes FlexAttention on CUDA: below, its compilation costs more than it saves."""
_TILE_ROWS = {"cpu": 128, "cuda": 1024}
_LARGEST_RANK = 128
_MOST_CORRECTIONS = 2


def band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kinds: str,
    layout: TokenLayout,
    width: int,
    corrections: Sequence[Correction] = (),
    out: Tensor | None = None,
    implementation: Implementation = "auto",
    precision: Precision = "full",
) -> Tensor:
    """Attention of every head under its band mask (method §6), tokens of text and of dense frames dense.

    Args:
        q, k, v: `[H, L, D]` floating, video tokens frame-major, then text; after normalization and rotary embedding.
        kinds: one letter a head: `s` spatial (band over frame-major order) or `t` temporal (place-major).
        layout: the token grid; `layout.num_tokens` is L.
        width: a token sees `|i - j| < width`; from `num_video` on the mask leaves everything.
        corrections: added to the normalized result, e.g. what the residual cache kept.
        out: receives the result: `[H, L, D]` in the dtype of `q`, any strides, no memory in common with `q`, `k` or `v`.
        implementation: `auto` chooses by device, dtype, head size and length.
        precision: of the products.

    Returns: `[H, L, D]` in the dtype of `q`; `out` if given. Differentiable in full precision, without `out`, but for `triton`.
    Raises: ValueError for shapes, kinds or widths that do not fit, or an implementation that cannot take the tensors.
    """
    _check(q, k, v, kinds=kinds, layout=layout, width=width, implementation=implementation)
    _check_corrections(q, corrections)
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or out.device != q.device):
        raise ValueError(
            f"out must be {q.dtype} {tuple(q.shape)} on {q.device}, got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if out is not None and _needs_gradient(q, k, v, out):
        raise ValueError("out cannot be given where a gradient is needed: call under torch.no_grad(), or without out")
    if layout.dense_frames:
        # As text: no implementation knows of them.
        behind, first = (x.roll(-layout.num_dense, dims=1) for x in (q, k, v)), layout.num_dense
        banded = band_attention(
            *behind, kinds=kinds, layout=layout.banded, width=width, implementation=implementation, precision=precision
        )
        result = corrected(banded.roll(first, dims=1), corrections)
        return result if out is None else out.copy_(result)
    if precision != "full":
        chosen = _without_flex(implementation)
        kept = quantize_keys_values(k, v, kinds=kinds, layout=layout, precision=precision, implementation=chosen)
        return eight_bit_attention(q, kept, width=width, corrections=corrections, out=out, implementation=chosen)
    if _takes_triton(q, k, v, implementation, layout=layout, width=width, corrections=corrections, out=out):
        from reelquant.ops.band_attention.launch import band_attention_triton

        return band_attention_triton(q, k, v, kinds=kinds, layout=layout, width=width, corrections=corrections, out=out)
    result = corrected(_in_torch(q, k, v, kinds, layout, width, implementation), corrections)
    return result if out is None else out.copy_(result)


def dense_and_band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kinds: str,
    layout: TokenLayout,
    width: int,
    implementation: Implementation = "auto",
    precision: Precision = "full",
) -> tuple[Tensor, Tensor]:
    """`(dense, band)`: attention over all keys, and what `band_attention` gives; for the steps that refresh a residual.

    `triton` does both in one pass: the band and the text, then what is left. `auto` runs one after the other, each as
    fast as it goes: on an H100 torch's dense attention is expected to win that back. In 8 bits one pass is always taken.

    Args, Raises: as `band_attention`.
    Returns: two `[H, L, D]` in the dtype of `q`.
    """
    _check(q, k, v, kinds=kinds, layout=layout, width=width, implementation=implementation)
    if layout.dense_frames:
        behind = (x.roll(-layout.num_dense, dims=1) for x in (q, k, v))
        both = dense_and_band_attention(
            *behind, kinds=kinds, layout=layout.banded, width=width, implementation=implementation, precision=precision
        )
        dense, band = (x.roll(layout.num_dense, dims=1) for x in both)
        return dense, band
    if precision != "full":
        chosen = _without_flex(implementation)
        kept = quantize_keys_values(k, v, kinds=kinds, layout=layout, precision=precision, implementation=chosen)
        return eight_bit_dense_and_band(q, kept, width=width, implementation=chosen)
    if implementation == "triton":
        takes_triton(implementation, q.device, unsuited=_unsuited(q, k, v, (), None))
        from reelquant.ops.band_attention.launch import dense_and_band_triton

        return dense_and_band_triton(q, k, v, kinds=kinds, layout=layout, width=width)
    if implementation == "reference":
        rows = _TILE_ROWS.get(q.device.type, 1024)
        return dense_and_band_reference(q, k, v, kinds=kinds, layout=layout, width=width, tile_rows=rows)
    dense = full_dense_attention(q, k, v)
    if width >= layout.num_video:
        return dense, dense
    return dense, band_attention(q, k, v, kinds=kinds, layout=layout, width=width, implementation=implementation)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, precision: Precision = "full") -> Tensor:
    """Attention of `q [H, R, D]` over all keys `[H, L, D]`: torch's own in full precision, else `ops/eight_bit_attention`.

    Where torch must be deterministic (an error, not a warning) and a gradient is needed, FlexAttention takes the place of
    torch's own, which takes longer to give the same bits every time (docs/performance.md).
    """
    if precision == "full":
        if _wants_fixed_gradients(q, k, v):
            from reelquant.ops.band_attention.flex import dense_attention_flex

            return dense_attention_flex(q, k, v)
        return full_dense_attention(q, k, v)
    heads, tokens, _ = k.shape
    kept = quantize_keys_values(k, v, kinds="s" * heads, layout=TokenLayout(1, 1, tokens, 0), precision=precision)
    return eight_bit_attention(q, kept)


def _without_flex(implementation: Implementation) -> EightBitImplementation:
    if implementation == "flex":
        raise ValueError(
            "implementation flex has no 8-bit attention; take auto, reference or triton, or precision full"
        )
    return implementation


def _in_torch(
    q: Tensor, k: Tensor, v: Tensor, kinds: str, layout: TokenLayout, width: int, implementation: Implementation
) -> Tensor:
    on_cuda = q.device.type == "cuda"
    if implementation == "flex" or (implementation == "auto" and on_cuda and layout.num_tokens >= FLEX_TOKENS):
        from reelquant.ops.band_attention.flex import band_attention_flex

        return band_attention_flex(q, k, v, kinds=kinds, layout=layout, width=width)
    rows = _TILE_ROWS.get(q.device.type, 1024)
    return band_attention_reference(q, k, v, kinds=kinds, layout=layout, width=width, tile_rows=rows)


def _check(
    q: Tensor, k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, width: int, implementation: Implementation
) -> None:
    if q.ndim != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k and v must all be [H, L, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if q.shape[1] != layout.num_tokens:
        raise ValueError(f"q has {q.shape[1]} tokens, the layout {layout} has {layout.num_tokens}")
    if len(kinds) != q.shape[0] or set(kinds) - {"s", "t"}:
        raise ValueError(f"kinds must be one of s and t for each of {q.shape[0]} heads, got {kinds!r}")
    if width < 1:
        raise ValueError(f"the band's width is {width}; it must be at least 1 token")
    if implementation == "flex" and q.device.type != "cuda":
        raise ValueError(f"implementation flex needs CUDA tensors, these are on {q.device}; use reference or auto")


def _check_corrections(q: Tensor, corrections: Sequence[Correction]) -> None:
    heads, tokens, head_dim = q.shape
    for term in corrections:
        rank = term.rows.shape[-1]
        if term.rows.shape != (heads, tokens, rank) or term.directions.shape != (heads, head_dim, rank):
            raise ValueError(
                f"a correction needs rows [{heads}, {tokens}, r] and directions [{heads}, {head_dim}, r], "
                f"got {tuple(term.rows.shape)} and {tuple(term.directions.shape)}"
            )
        scales, expected = term.row_scale, (heads, -(-tokens // SCALED_TOKENS), rank)
        if scales is not None and (
            scales.shape != expected or scales.dtype != torch.bfloat16 or not scales.is_contiguous()
        ):
            raise ValueError(
                f"row_scale of a correction must be bfloat16 {list(expected)}, contiguous, "
                f"got {scales.dtype} {list(scales.shape)}"
            )


def _takes_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    implementation: Implementation,
    *,
    layout: TokenLayout,
    width: int,
    corrections: Sequence[Correction],
    out: Tensor | None,
) -> bool:
    if implementation == "flex" or (implementation == "auto" and width >= layout.num_video):
        return False
    return takes_triton(implementation, q.device, unsuited=_unsuited(q, k, v, corrections, out))


def _unsuited(q: Tensor, k: Tensor, v: Tensor, corrections: Sequence[Correction], out: Tensor | None) -> str | None:
    """What about a call the Triton kernel does not take, None where it takes it."""
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all bfloat16 or all float16"
    if q.shape[2] not in (64, 128):
        return f"the head size is {q.shape[2]}, not 64 or 128"
    terms = [tensor for term in corrections for tensor in (term.rows, term.directions)]
    if _needs_gradient(q, k, v, *terms):
        return "a gradient is needed"
    rows = [term.rows for term in corrections]
    if any(x.stride(2) != 1 for x in (q, k, v, *rows, *([] if out is None else [out]))):
        return "the last dimension of q, k, v, out or of rows is not contiguous"
    if len(corrections) > _MOST_CORRECTIONS:
        return f"there are {len(corrections)} corrections, more than {_MOST_CORRECTIONS}"
    for x in rows:
        rank = x.shape[2]
        if x.dtype not in (q.dtype, torch.int8) or rank & (rank - 1) or not 16 <= rank <= _LARGEST_RANK:
            return (
                f"a correction is {x.dtype} of rank {rank}, not {q.dtype} or int8 of a power of two from 16 to "
                f"{_LARGEST_RANK}"
            )
    return None


def _wants_fixed_gradients(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Where FlexAttention is the faster way to the same gradients every time."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    on_tensor_cores = q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
    return strict and on_tensor_cores and k.shape[1] >= FLEX_TOKENS and _needs_gradient(q, k, v)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
