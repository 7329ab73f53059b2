"""Uniform symmetric integers, for weights and activations alike (S2Q-VDiT and QuantSparse, both section 3.1).

    scale = max|x| * clip / max_code(bits),    code = clamp(round(x / scale), -max_code, max_code)

The most negative two's-complement code is not used, so the grid is symmetric. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.fake_quantization import op
from reelquant.ops.fake_quantization.reference import in_compute_dtype, shared_scale

UNQUANTIZED_BITS = 16


def max_code(bits: int) -> int:
    """Largest code of a symmetric `bits`-bit integer, `2**(bits - 1) - 1`. ValueError unless `bits` is 2..8."""
    if bits not in range(2, 9):
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r} ({UNQUANTIZED_BITS} = leave unquantized)")
    return int(2 ** (bits - 1) - 1)


def quantize(x: Tensor, bits: int, dim: int, clip: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Integer codes and the scale that undoes them: `codes * scale` is the quantized `x`.

    Args:
        x: any floating dtype and shape; computed in float32 at least. NaN and inf come out as a NaN or inf scale.
        bits: 2..8.
        dim: the axis whose elements share one scale (`-1`: one scale per token of `[..., L, d]`).
        clip: factor on `max|x|`, dimensionless; a tensor must broadcast to the scale.

    Returns: codes int8, shape of `x`; scale float32, shape of `x` with 1 at `dim`.
    Raises: ValueError for `bits` outside 2..8, a `clip` number that is not positive, or an `x` that is not floating.
    """
    largest = max_code(bits)
    with torch.no_grad():
        x = in_compute_dtype(x)
        scale = shared_scale(x, clip, largest, dim)
        codes = (x / scale).round_().clamp_(-largest, largest).to(torch.int8)
    return codes, scale.float()


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
