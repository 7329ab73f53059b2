"""Fake quantization in plain torch, differentiable: what defines the results of the kernel, and the mathematics of the grids.

Autograd would keep several float32 tensors of `x`'s size of these operations. Functions of their own keep `x`, as it came,
and what is one number a row; the gradients are those of the plain operations, to the bit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

SMALLEST_SCALE = 1e-30
"""Scale of an all-zero row: its codes are 0 whatever the scale, which must stay a normal float32 (also as bfloat16)."""
LARGEST_INT8 = 127
UNQUANTIZED_BITS = 16
GROUP_SIZE = 64
"""Inputs of a weight that share a group scale."""
ROW_GROUP = 64
"""Width of the kernel's tiles where rows have no groups."""


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


def fake_quantize_reference(x: Tensor, clip: float | Tensor, largest: int, dim: int) -> Tensor:
    """See `op.fake_quantize`."""
    return cast(Tensor, _FakeQuantize.apply(x, clip, largest, dim))  # type: ignore[no-untyped-call]


def fake_quantize_two_level_reference(weight: Tensor, clip: float | Tensor, largest: int, group_size: int) -> Tensor:
    """See `op.fake_quantize_two_level`."""
    values = weight.float()
    scale = two_level_scale(values, clip, largest)
    groups = in_groups(values, group_size)
    group_scale = fit_group_scale(groups.detach(), scale.detach(), largest)
    step = group_scale[:, :, None] * scale[:, :, None]
    rounded = cast(Tensor, _RoundToGrid.apply(groups, step, largest))  # type: ignore[no-untyped-call]
    return rounded.flatten(1)[:, : weight.shape[1]].to(weight.dtype)


def shared_scale(x: Tensor, clip: float | Tensor, largest: int, dim: int) -> Tensor:
    """`max|x| * clip / largest` over `dim` (kept as 1), never 0; differentiable in `x` and `clip`."""
    return _scale(cast(Tensor, _LargestMagnitude.apply(x, dim)), clip, largest)  # type: ignore[no-untyped-call]


def two_level_scale(weight: Tensor, clip: float | Tensor, largest: int) -> Tensor:
    """`[out, 1]` of `weight` [out, in]: such that the largest group scale, `127 // largest`, reaches the row's largest."""
    return shared_scale(weight, clip, largest * (LARGEST_INT8 // largest), 1)


def fit_group_scale(groups: Tensor, scale: Tensor, largest: int) -> Tensor:
    """float32 [out, G] of integers, for `groups` [out, G, group_size] and `scale` [out, 1].

    `clip` is already in `scale`: it narrows every group of a row alike, so the ratio of group to row is that of the
    unclipped maxima.
    """
    largest_group_scale = LARGEST_INT8 // largest
    amax = groups.abs().amax(2)
    ratio = amax / amax.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    above = (ratio * largest_group_scale).ceil_().clamp_(1, largest_group_scale)
    below = (above - 1).clamp_min_(1)

    def squared_error(group_scale: Tensor) -> Tensor:
        step = (group_scale * scale)[:, :, None]
        codes = (groups / step).round_().clamp_(-largest, largest)
        return codes.mul_(step).sub_(groups).square_().sum(2)

    return torch.where(squared_error(below) < squared_error(above), below, above)


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """[out, in] -> [out, G, group_size], the last group filled up with zeros."""
    return pad(weight, (0, -weight.shape[1] % group_size)).reshape(weight.shape[0], -1, group_size)


def in_compute_dtype(x: Tensor) -> Tensor:
    """`x` in float32 at least. ValueError if it is not floating."""
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor, got {x.dtype}")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_clip(clip: float | Tensor) -> None:
    """ValueError for a number that is not positive."""
    if not isinstance(clip, Tensor) and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip!r} (1.0 = the whole range)")


def results(x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for `out` as `x`, `amax` float32 [rows], and `group_scale` uint8 [rows, groups], or [rows, 0] without groups."""
    rows = x.numel() // x.shape[-1]
    num_groups = -(-x.shape[-1] // group_size) if group_size else 0
    amax = x.new_empty(rows, dtype=torch.float32)
    return torch.empty_like(x), amax, x.new_empty((rows, num_groups), dtype=torch.uint8)


def gradients(x: Tensor, of_x: bool) -> tuple[Tensor, Tensor]:
    """Memory for the gradient of `x`, [0] where there is none, and a float32 [rows] for that of the clip."""
    return torch.empty_like(x) if of_x else x.new_empty(0), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: float | Tensor, largest: int, dim: int) -> Tensor:
        values = in_compute_dtype(x)
        amax = values.abs().amax(dim, keepdim=True)
        scale = _scale(amax, clip, largest)
        ctx.save_for_backward(x, amax, scale, *([clip] if isinstance(clip, Tensor) else []))
        ctx.clip, ctx.largest, ctx.dim = None if isinstance(clip, Tensor) else clip, largest, dim
        return (values / scale).round_().clamp_(-largest, largest).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grad_outputs
        x, amax, scale, *given = ctx.saved_tensors
        clip = given[0] if given else ctx.clip
        values = in_compute_dtype(x)
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
    """`clamp(round(x / scale)) * scale`, straight-through; `scale` broadcasts to `x`, gradients reach both."""

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


def _scale(amax: Tensor, clip: float | Tensor, largest: int) -> Tensor:
    check_clip(clip)
    range_ = amax * clip
    if range_.shape != amax.shape:
        shape = tuple(cast(Tensor, clip).shape)
        raise ValueError(f"clip of shape {shape} does not broadcast to the scale's shape {tuple(amax.shape)}")
    # By a tensor: CUDA multiplies by the reciprocal of a number, which is not what the quotient rounds to.
    return (range_ / range_.new_full((), largest)).clamp_min(SMALLEST_SCALE)
