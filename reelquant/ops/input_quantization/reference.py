"""The input of a quantized linear layer from its norm to its codes, in plain torch: what defines the result of the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from reelquant.quantization.quantizer import quantize
from reelquant.quantization.rotation import transform_input

TILE_ROWS = 4096
"""Tokens at a time: bounds the float32 intermediates."""


class Norm(NamedTuple):
    """LayerNorm without weights of its own, then `* scale_plus_one + shift`."""

    eps: float
    scale_plus_one: Tensor
    """`[d]` floating: 1 + the modulation's scale."""
    shift: Tensor
    """`[d]` floating."""


def quantize_input_reference(
    x: Tensor,
    *,
    bits: int,
    channel_scale: Tensor | None,
    rotation: Tensor | None,
    clip: Tensor | None,
    norm: Norm | None,
) -> tuple[Tensor, Tensor]:
    """See `op.quantize_input`; float32 throughout."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    matrix = None if rotation is None else rotation.float()
    for start in range(0, len(x), TILE_ROWS):
        rows = slice(start, start + TILE_ROWS)
        values = x[rows].float()
        if norm is not None:
            values = layer_norm(values, values.shape[1:], eps=norm.eps)
            values = values * norm.scale_plus_one.float() + norm.shift.float()
        values = transform_input(values, channel_scale, matrix)
        codes[rows], of_tokens = quantize(values, bits, -1, 1.0 if clip is None else clip)
        scale[rows] = of_tokens.squeeze(-1)
    return codes, scale
