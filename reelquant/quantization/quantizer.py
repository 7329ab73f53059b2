"""Uniform symmetric integers, for weights and activations alike (S2Q-VDiT and QuantSparse, both section 3.1).

    scale = max|x| * clip / max_code(bits),    code = clamp(round(x / scale), -max_code, max_code)

The most negative two's-complement code is not used, so the grid is symmetric. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

from torch import Tensor

from reelquant.ops.fake_quantization import op
from reelquant.ops.fake_quantization.reference import UNQUANTIZED_BITS, max_code, quantize

__all__ = ["UNQUANTIZED_BITS", "fake_quantize", "max_code", "quantize"]


def fake_quantize(x: Tensor, bits: int, dim: int, clip: float | Tensor = 1.0) -> Tensor:
    """`x` rounded to the grid of `quantize`, in `x`'s dtype, differentiable (straight-through estimator).

    Gradient to `x`: 1 where the code is not clamped, 0 where it is, plus what flows through `max|x|` into the scale
    (without that term a rotation or a channel scale could not learn to make the scale smaller). Gradient to a tensor
    `clip`: through the scale, as in LSQ (arXiv 1902.08153, eq. 3).

    `bits` 16 returns `x` itself. Other arguments and errors: see `quantize`.
    """
    if bits == UNQUANTIZED_BITS:
        return x
    return op.fake_quantize(x, clip, max_code(bits), dim)
