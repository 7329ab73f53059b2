"""The input of a quantized linear layer from its norm to its codes, in plain torch: what defines the result of the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from reelquant.ops.fake_quantization.reference import quantize

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


def rotate_blocks(x: Tensor, rotation: Tensor) -> Tensor:
    """`x @ blockdiag(R, ..., R)` for `x` [..., d] and `rotation` R [b, b], b dividing d; computed in `x`'s dtype."""
    check_square("rotation", rotation)
    b = rotation.shape[0]
    if x.ndim < 1 or x.shape[-1] % b:
        raise ValueError(f"a rotation of blocks of {b} needs [..., d] with d a multiple of {b}, got {tuple(x.shape)}")
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // b, b)
    return (blocks @ rotation.to(x.dtype)).reshape(x.shape)


def transform_input(x: Tensor, channel_scale: Tensor | None, rotation: Tensor | None) -> Tensor:
    """`rotate_blocks(x / channel_scale, rotation)`; either may be None.

    Args: `x` [..., d] floating; `channel_scale` [d], positive; `rotation` [b, b].
    Returns: [..., d] in `x`'s dtype (pass `x.float()` to keep what the division and the product add in precision).
    Raises: ValueError where the shapes do not fit.
    """
    if channel_scale is not None:
        check_channel_scale(channel_scale, x.shape[-1])
        x = (x / channel_scale).to(x.dtype)
    return x if rotation is None else rotate_blocks(x, rotation)


def check_square(name: str, matrix: Tensor) -> None:
    """ValueError naming `name` unless `matrix` is square."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(matrix.shape)}")


def check_channel_scale(channel_scale: Tensor, d: int) -> None:
    """ValueError unless there is one number for each of `d` features."""
    if channel_scale.shape != (d,):
        raise ValueError(f"channel_scale must be [{d}], one number per input feature, got {tuple(channel_scale.shape)}")
