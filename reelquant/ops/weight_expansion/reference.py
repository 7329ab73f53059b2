"""Stored weight codes expanded to INT8, in plain torch: what defines the result of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.quantization.packing import unpack_bits
from reelquant.quantization.weight_grid import WeightGrid

TILE_ROWS = 1024
"""Rows at a time: unpacking takes an int64 a code, 16 times the expanded weight."""


def expand_weight_reference(packed: Tensor, *, bits: int, group_scale: Tensor | None, out: Tensor) -> Tensor:
    """See `op.expand_weight`; fills `out` [n, d]."""
    num_inputs = out.shape[1]
    for start in range(0, len(packed), TILE_ROWS):
        rows = slice(start, start + TILE_ROWS)
        codes = unpack_bits(packed[rows], bits, num_inputs)
        scale = torch.ones(len(codes), 1, device=codes.device)
        out[rows] = WeightGrid(scale, None if group_scale is None else group_scale[rows], bits).expand(codes)
    return out
