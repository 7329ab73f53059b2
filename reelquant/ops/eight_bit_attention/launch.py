"""Starts the Triton kernels of attention in 8 bits. Tensors on the CPU run where Triton interprets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import e, log2
from typing import Any

import torch
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from reelquant.ops.architecture import current_stream, launching
from reelquant.ops.band_attention.launch import Tile, correction_arguments, new_output
from reelquant.ops.band_attention.reference import Correction
from reelquant.ops.eight_bit_attention.kernel import (
    CHUNK,
    eight_bit_attention_kernel,
    final_statistics,
    partial_statistics,
    quantize_keys_values_kernel,
)
from reelquant.ops.eight_bit_attention.reference import GROUP, LARGEST, STRIDE, KeysValues, Precision, padded
from reelquant.tokens import TokenLayout


@dataclass(frozen=True)
class EightBitTile(Tile):
    """Rows of queries, columns of keys (at most `GROUP`, a power of two), warps and stages."""

    promote: bool = True
    """Add the sum of every block of keys in float32; else the tensor cores carry it, with about 14 bits."""
    registers: int | None = None
    """At most so many a thread, for more programs on a multiprocessor."""


TILES = {64: EightBitTile(64, 128, 4, 3, shared_kib=53), 128: EightBitTile(64, 128, 4, 3, shared_kib=105)}
"""Head size -> tile, the fastest of eight measured. Compiled for sm_90a its products are asynchronous, and nothing spills."""

SIXTEEN_BIT_TILE = EightBitTile(64, 64, 4, 3, shared_kib=81)
"""For 16-bit values."""


def quantize_keys_values_triton(
    k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, precision: Precision
) -> KeysValues:
    """See `op.quantize_keys_values`, which checks."""
    heads, tokens, head_dim = k.shape
    padded_video = padded(layout.num_video)
    length = padded_video + padded(layout.num_text)
    eight_bit_values = precision == "int8_fp8"
    num_chunks = cdiv(tokens, CHUNK)
    partial = k.new_empty(num_chunks, 4, heads, head_dim, dtype=torch.float32)
    key_shift, value_shift, value_scale = k.new_empty(3, heads, head_dim, dtype=torch.float32)
    key_codes = k.new_empty(heads, length, head_dim, dtype=torch.int8)
    key_scale = k.new_empty(heads, length // GROUP, dtype=torch.float32)
    value_codes = k.new_empty(heads, head_dim, length, dtype=torch.float8_e4m3fn if eight_bit_values else v.dtype)
    strides = (k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    with launching(k):
        partial_statistics[(num_chunks, heads)](
            k, v, partial, *strides, tokens, HEADS=heads, DIM=head_dim, CHUNK=CHUNK, TOKENS=64, STRIDE=STRIDE
        )
        final_statistics[(heads,)](
            partial,
            key_shift,
            value_shift,
            value_scale,
            num_chunks,
            cdiv(tokens, STRIDE),
            tokens,
            HEADS=heads,
            DIM=head_dim,
            LARGEST=LARGEST,
            CHUNKS=16,
        )
        quantize_keys_values_kernel[(length // GROUP, heads)](
            k,
            v,
            key_shift,
            value_shift,
            value_scale,
            _temporal(kinds, k.device, current_stream(k.device)),
            key_codes,
            key_scale,
            value_codes,
            *strides,
            layout.num_video,
            layout.num_text,
            padded_video,
            length,
            layout.num_frames,
            layout.height * layout.width,
            DIM=head_dim,
            GROUP=GROUP,
            EIGHT_BIT_VALUES=eight_bit_values,
            num_warps=8,
        )
    if not eight_bit_values:
        value_scale, value_shift = torch.ones_like(value_scale), torch.zeros_like(value_shift)
    return KeysValues(key_codes, key_scale, value_codes, value_scale, value_shift, kinds, layout)


def eight_bit_attention_triton(
    q: Tensor,
    keys_values: KeysValues,
    *,
    width: int,
    corrections: Sequence[Correction] = (),
    out: Tensor | None = None,
    tile: EightBitTile | None = None,
) -> Tensor:
    """See `op.eight_bit_attention`, which checks; `tile` stands in for the default."""
    out = new_output(q) if out is None else out
    _launch(q, keys_values, (out, None), width=width, corrections=corrections, tile=tile)
    return out


def eight_bit_dense_and_band_triton(
    q: Tensor, keys_values: KeysValues, *, width: int, tile: EightBitTile | None = None
) -> tuple[Tensor, Tensor]:
    """See `op.eight_bit_dense_and_band`: one pass, the band and the text first, then what is left."""
    band, dense = new_output(q), new_output(q)
    _launch(q, keys_values, (band, dense), width=width, corrections=(), tile=tile)
    return dense, band


def _launch(
    q: Tensor,
    keys_values: KeysValues,
    outs: tuple[Tensor, Tensor | None],
    *,
    width: int,
    corrections: Sequence[Correction],
    tile: EightBitTile | None,
) -> None:
    kv, layout = keys_values, keys_values.layout
    heads, length, head_dim = kv.key_codes.shape
    eight_bit_values = kv.value_codes.dtype == torch.float8_e4m3fn
    cut = tile or (TILES[head_dim] if eight_bit_values else SIXTEEN_BIT_TILE)
    out, dense = outs[0], outs[0] if outs[1] is None else outs[1]
    options: dict[str, Any] = {} if cut.registers is None else {"maxnreg": cut.registers}
    with launching(q, cut.shared_kib):
        eight_bit_attention_kernel[(heads * (cdiv(layout.num_video, cut.rows) + cdiv(layout.num_text, cut.rows)),)](
            q=q,
            keys=_descriptor(kv.key_codes, (cut.columns, head_dim)),
            key_scale=kv.key_scale,
            values=_descriptor(kv.value_codes, (head_dim, cut.columns)),
            value_scale=kv.value_scale,
            value_mean=kv.value_shift,
            temporal=_temporal(kv.kinds, q.device, current_stream(q.device)),
            out=out,
            dense_out=dense,
            q_head=q.stride(0),
            q_stride=q.stride(1),
            out_head=out.stride(0),
            out_stride=out.stride(1),
            dense_head=dense.stride(0),
            dense_stride=dense.stride(1),
            num_heads=heads,
            num_video=layout.num_video,
            num_text=layout.num_text,
            text_from=kv.padded_video,
            length=length,
            frames=layout.num_frames,
            places=layout.height * layout.width,
            width=min(width, layout.num_video),
            scale=head_dim**-0.5 * log2(e),
            ROWS=cut.rows,
            COLUMNS=cut.columns,
            HEAD_DIM=head_dim,
            GROUP=GROUP,
            EIGHT_BIT_VALUES=eight_bit_values,
            PROMOTE=cut.promote,
            BOTH=outs[1] is not None,
            num_warps=cut.warps,
            num_stages=cut.stages,
            **correction_arguments(q, corrections),
            **options,
        )


def _descriptor(x: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """For `tma` loads from contiguous `[H, rows, columns]`, all heads below each other."""
    flat = x.flatten(0, 1)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), list(block))


@lru_cache(maxsize=256)
def _temporal(kinds: str, device: torch.device, _stream: int) -> Tensor:
    """int32, 1 where a head is temporal."""
    with torch.inference_mode(False):
        return torch.tensor([kind == "t" for kind in kinds], dtype=torch.int32).to(device)
