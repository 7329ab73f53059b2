"""Uniform symmetric integers, for weights and activations alike (S2Q-VDiT and QuantSparse, both section 3.1).

    scale = max|x| * clip / max_code(bits),    code = clamp(round(x / scale), -max_code, max_code)

The most negative two's-complement code is not used, so the grid is symmetric. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

UNQUANTIZED_BITS = 16
SMALLEST_SCALE = 1e-30
"""Scale of an all-zero row: its codes are 0 whatever the scale, which must stay a normal float32 (also as bfloat16)."""


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
        x = _in_compute_dtype(x)
        scale = shared_scale(x, largest, dim, clip)
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
    largest = max_code(bits)
    _check_clip(clip)
    return cast(Tensor, _FakeQuantize.apply(x, clip, largest, dim))  # type: ignore[no-untyped-call]


def shared_scale(x: Tensor, largest: int, dim: int, clip: float | Tensor) -> Tensor:
    """`max|x| * clip / largest` over `dim` (kept as 1), never 0; differentiable in `x` and `clip`."""
    _check_clip(clip)
    return _scale(cast(Tensor, _LargestMagnitude.apply(x, dim)), largest, clip)  # type: ignore[no-untyped-call]


def round_to_grid(x: Tensor, scale: Tensor, largest: int) -> Tensor:
    """`clamp(round(x / scale)) * scale`, straight-through; `scale` broadcasts to `x`, gradients reach both."""
    return cast(Tensor, _RoundToGrid.apply(x, scale, largest))  # type: ignore[no-untyped-call]


# Autograd would keep several float32 tensors of `x`'s size of these operations. Functions of their own keep `x`, as it came,
# and what is one number a row; the gradients are those of the plain operations, to the bit.


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: float | Tensor, largest: int, dim: int) -> Tensor:
        values = _in_compute_dtype(x)
        amax = values.abs().amax(dim, keepdim=True)
        scale = _scale(amax, largest, clip)
        ctx.save_for_backward(x, amax, scale, *([clip] if isinstance(clip, Tensor) else []))
        ctx.clip, ctx.largest, ctx.dim = None if isinstance(clip, Tensor) else clip, largest, dim
        return (values / scale).round_().clamp_(-largest, largest).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grad_outputs
        x, amax, scale, *given = ctx.saved_tensors
        clip = given[0] if given else ctx.clip
        values = _in_compute_dtype(x)
        inside, grad_scale = _grid_gradients(grad, values, scale, ctx.largest)
        grad_clip = None
        # Through `amax * clip / largest`, where that is not below the smallest scale.
        of_quotient = grad_scale * (amax * clip / ctx.largest >= SMALLEST_SCALE) / ctx.largest
        if ctx.needs_input_grad[1]:
            grad_clip = (of_quotient * amax).sum_to_size(clip.shape)
        if not ctx.needs_input_grad[0]:
            return None, grad_clip, None, None
        grad_x = (grad * inside).to(values.dtype)
        del inside
        grad_x += _of_largest_magnitude(of_quotient * clip, values, amax, ctx.dim)
        return grad_x.to(x.dtype), grad_clip, None, None


class _LargestMagnitude(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        amax = x.abs().amax(dim, keepdim=True)
        ctx.save_for_backward(x, amax)
        ctx.dim = dim
        return amax

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        x, amax = ctx.saved_tensors
        return _of_largest_magnitude(grad_outputs[0], x, amax, ctx.dim), None


class _RoundToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, largest: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.largest = largest
        return (x / scale).round_().clamp_(-largest, largest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grad_outputs
        x, scale = ctx.saved_tensors
        inside, grad_scale = _grid_gradients(grad, x, scale, ctx.largest)
        return grad * inside if ctx.needs_input_grad[0] else None, grad_scale, None


def _grid_gradients(grad: Tensor, x: Tensor, scale: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Where the code is not clamped, and the gradient of the scale.

    d(code * scale)/d(scale) is the rounding error inside the range and the clamped code outside it.
    """
    steps = x / scale
    codes = steps.round()
    inside = codes.abs() <= largest
    slope = codes.clamp_(-largest, largest).sub_(steps.mul_(inside))
    del steps
    return inside, slope.mul_(grad).sum_to_size(scale.shape)


def _of_largest_magnitude(grad: Tensor, x: Tensor, amax: Tensor, dim: int) -> Tensor:
    """Gradient of `x` from that of `max|x|`: equal shares to all elements that have it."""
    attained = x.abs() == amax
    return (grad * attained).div_(attained.sum(dim, keepdim=True)).mul_(x.sgn())


def _scale(amax: Tensor, largest: int, clip: float | Tensor) -> Tensor:
    scale = amax * clip / largest
    if scale.shape != amax.shape:
        shape = tuple(cast(Tensor, clip).shape)
        raise ValueError(f"clip of shape {shape} does not broadcast to the scale's shape {tuple(amax.shape)}")
    return scale.clamp_min(SMALLEST_SCALE)


def _check_clip(clip: float | Tensor) -> None:
    if not isinstance(clip, Tensor) and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip!r} (1.0 = the whole range)")


def _in_compute_dtype(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor, got {x.dtype}")
    return x.to(torch.promote_types(x.dtype, torch.float32))
