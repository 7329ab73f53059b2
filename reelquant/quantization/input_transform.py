"""The input of a quantized layer: scaled, rotated and quantized per token.

Layers that read the same tensor have the same transform; each computes it for itself, so that none depends on another. Only
fused blocks, which own the order of calls, compute it once for a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from reelquant.ops.input_quantization.op import quantize_input
from reelquant.quantization.quantizer import quantize
from reelquant.quantization.rotation import transform_input

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of inputs that the operations of `reelquant.ops` take on a GPU."""

_least_bits: ContextVar[int] = ContextVar("least_activation_bits", default=0)


class QuantizedInput(NamedTuple):
    """A layer's input after its transform."""

    values: Tensor
    """`[..., d]`: int8 codes, or float32 where activations are not quantized."""
    scale: Tensor | None
    """`[..., 1]` float32, None where activations are not quantized."""


def set_least_activation_bits(bits: int | None) -> None:
    """Sets the fewest activation bits of this thread's quantized layers; None: every layer's own.

    Where that is more than a layer's own bits its input is not clipped, as its clip is that of fewer bits.
    """
    _least_bits.set(bits or 0)


@contextmanager
def least_activation_bits(bits: int | None) -> Iterator[None]:
    """`set_least_activation_bits` while open."""
    token = _least_bits.set(bits or 0)
    try:
        yield
    finally:
        _least_bits.reset(token)


def current_activation_bits(own: int) -> int:
    """Activation bits of a layer with `own` bits, in this thread at this moment."""
    return max(own, _least_bits.get())


def quantized_input(
    x: Tensor,
    activation_bits: int,
    *,
    channel_scale: Tensor | None,
    rotation: Tensor | None,
    activation_clip: Tensor | None,
) -> QuantizedInput:
    """Divides `x` by the channel scale, rotates it and quantizes it per token.

    Args:
        x: `[..., d]`, any floating dtype.
        activation_bits: 4 to 8, or 16 for none; `least_activation_bits` may raise them.
        channel_scale: float32 `[d]`.
        rotation: bfloat16 `[b, b]`.
        activation_clip: float32 `[1]`, factor on every token's range.
    """
    bits = current_activation_bits(activation_bits)
    clip = None if bits > activation_bits else activation_clip
    if bits < 16 and x.is_cuda and x.dtype in KERNEL_DTYPES:
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = quantize_input(rows, bits=bits, channel_scale=channel_scale, rotation=rotation, clip=clip)
        return QuantizedInput(codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1))
    values = transform_input(x.float(), channel_scale, None if rotation is None else rotation.float())
    if bits == 16:
        return QuantizedInput(values, None)
    return QuantizedInput(*quantize(values, bits, -1, 1.0 if clip is None else clip))
