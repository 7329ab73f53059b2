"""Stored weight codes expanded to INT8, in plain torch: what defines the result of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.fake_quantization.reference import GROUP_SIZE
from reelquant.ops.weight_expansion.bit_stream import unpack_bits

TILE_ROWS = 1024
"""Rows at a time: unpacking takes an int64 a code, 16 times the expanded weight."""


def expand_weight_reference(packed: Tensor, *, bits: int, group_scale: Tensor | None, out: Tensor) -> Tensor:
    """See `op.expand_weight`; fills `out` [n, d]."""
    num_inputs = out.shape[1]
    for start in range(0, len(packed), TILE_ROWS):
        rows = slice(start, start + TILE_ROWS)
        codes = unpack_bits(packed[rows], bits, num_inputs)
        if group_scale is not None:
            codes = codes * group_scale[rows].repeat_interleave(GROUP_SIZE, dim=1)[:, :num_inputs].to(torch.int8)
        out[rows] = codes
    return out
