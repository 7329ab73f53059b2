"""Fake quantization with gradients: the choice of an implementation, and the kernel's place in autograd.

| implementation | where |
|---|---|
| `reference` | any device, dtype and axis |
| `triton` | CUDA from compute capability 8.0; bf16, fp16 and fp32, contiguous, one scale per row of at most 16,384 |

The kernels are operators of torch, `torch.ops.reelquant.fake_quantize` and `fake_quantize_backward`. On the meta device, where
memory is counted, they stand for those of a GPU: what they return, and nothing else. `reference_only` counts the reference.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reelquant.ops.fake_quantization.reference import (
    check_clip,
    fake_quantize_reference,
    fake_quantize_two_level_reference,
    gradients,
    results,
)
from reelquant.ops.implementation import Implementation, takes_triton

__all__ = ["Implementation", "fake_quantize", "fake_quantize_two_level"]

LARGEST_WIDTH = 16384
"""Values of a row: 32 for each of a program's 512 threads."""
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def fake_quantize(
    x: Tensor, clip: float | Tensor, largest: int, dim: int, *, implementation: Implementation = "auto"
) -> Tensor:
    """`clamp(round(x / scale)) * scale` with `scale = max|x| * clip / largest` over `dim`; see `quantizer.fake_quantize`.

    Args:
        x: floating, any shape; computed in float32 at least, returned in its dtype.
        clip: positive; a tensor must broadcast to the scale.
        largest: largest code, 1 to 127.
        implementation: `auto` takes the kernel where it runs. Both give the same bits, and gradients that differ by the order
            of a sum.

    Raises: ValueError for a clip that is not positive or does not broadcast, an `x` that is not floating, or `triton` where
        the kernel does not run.
    """
    unsuited = _unsuited(x, clip) or (None if x.ndim and dim in (-1, x.ndim - 1) else f"dim {dim} is not the last")
    if takes_triton(implementation, x.device, unsuited=unsuited, on_meta=True):
        return _fused(x, clip, largest, 0)
    return fake_quantize_reference(x, clip, largest, dim)


def fake_quantize_two_level(
    weight: Tensor, clip: float | Tensor, largest: int, group_size: int, *, implementation: Implementation = "auto"
) -> Tensor:
    """`weight` [out, in] rounded to the grid of `weight_grid.fit_two_level`, in its dtype, differentiable.

    The integer group scales are constants to autograd. Both implementations choose the same ones, except where the two
    candidates' squared errors are equal but for the order in which they are summed. Other arguments as `fake_quantize`.
    """
    unsuited = _unsuited(weight, clip)
    if group_size & (group_size - 1) or not 16 <= group_size <= 128:
        unsuited = unsuited or f"groups of {group_size}; it takes powers of two from 16 to 128"
    if takes_triton(implementation, weight.device, unsuited=unsuited, on_meta=True):
        return _fused(weight, clip, largest, group_size)
    return fake_quantize_two_level_reference(weight, clip, largest, group_size)


def _unsuited(x: Tensor, clip: float | Tensor) -> str | None:
    if x.dtype not in _FLOATS or not x.numel() or not x.is_contiguous():
        return f"it takes bf16, fp16 or fp32, contiguous and not empty, not {x.dtype} {list(x.shape)}"
    if not x.ndim or x.shape[-1] > LARGEST_WIDTH:
        return f"it takes rows of at most {LARGEST_WIDTH}, not {list(x.shape)}"
    if isinstance(clip, Tensor):
        of_rows = (*x.shape[:-1], 1)
        if clip.dtype != torch.float32 or clip.device != x.device or clip.ndim > x.ndim:
            return (
                f"clip must be float32 on {x.device} as x is, of at most {x.ndim} dimensions, not {clip.dtype} "
                f"{list(clip.shape)} on {clip.device}"
            )
        if clip.numel() != 1 and (clip.shape != of_rows or not clip.is_contiguous()):
            return f"clip must be one number or {list(of_rows)}, contiguous, not {list(clip.shape)}"
    return None


def _fused(x: Tensor, clip: float | Tensor, largest: int, group_size: int) -> Tensor:
    check_clip(clip)
    factor = clip if isinstance(clip, Tensor) else x.new_full((1,), clip, dtype=torch.float32)
    return cast(Tensor, FusedFakeQuantize.apply(x, factor, largest, group_size))  # type: ignore[no-untyped-call]


class FusedFakeQuantize(torch.autograd.Function):
    """Keeps `x` as it came, and beside it one number a row and one byte a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, largest: int, group_size: int) -> Tensor:
        out, amax, group_scale = torch.ops.reelquant.fake_quantize(x, clip, largest, group_size)
        ctx.save_for_backward(x, clip, amax, *([group_scale] if group_size else []))
        ctx.largest, ctx.group_size = largest, group_size
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, clip, amax, *group_scale = ctx.saved_tensors
        of_x, of_clip = ctx.needs_input_grad[:2]
        grad_x, of_rows = torch.ops.reelquant.fake_quantize_backward(
            grad_outputs[0].contiguous(), x, clip, amax, group_scale[0] if group_scale else None, ctx.largest,
            ctx.group_size, of_x,
        )  # fmt: skip
        grad_clip = None
        if of_clip:
            grad_clip = of_rows.view(clip.shape) if clip.numel() == len(of_rows) else of_rows.sum().view(clip.shape)
        return grad_x if of_x else None, grad_clip, None, None


def _on_gpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from reelquant.ops.fake_quantization.kernel import launch_fake_quantize

    return launch_fake_quantize(*arguments)


def _backward_on_gpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    from reelquant.ops.fake_quantization.kernel import launch_fake_quantize_backward

    return launch_fake_quantize_backward(*arguments)


_LIBRARY = torch.library.Library("reelquant", "FRAGMENT")
_LIBRARY.define("fake_quantize(Tensor x, Tensor clip, int largest, int group_size) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "fake_quantize_backward(Tensor grad, Tensor x, Tensor clip, Tensor amax, Tensor? group_scale, int largest, "
    "int group_size, bool of_x) -> (Tensor, Tensor)"
)
_LIBRARY.impl("fake_quantize", _on_gpu, "CUDA")
_LIBRARY.impl("fake_quantize_backward", _backward_on_gpu, "CUDA")
_LIBRARY.impl("fake_quantize", lambda x, clip, largest, group_size: results(x, group_size), "Meta")
_LIBRARY.impl(
    "fake_quantize_backward",
    lambda grad, x, clip, amax, group_scale, largest, group_size, of_x: gradients(x, of_x),
    "Meta",
)
