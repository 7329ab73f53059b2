"""What rounding a linear layer's weight changes in it, `Q(W) - W`: checks, and the choice of an implementation.

One scale a row, of its largest magnitude (`quantization.quantizer`); computed in float32, rounded to the weight's dtype last.

| implementation | where | beside the result |
|---|---|---|
| `reference` | any device | float32 copies of 2^22 values |
| `triton` | CUDA from compute capability 8.0; bf16 and fp16 | nothing |
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.fake_quantization.reference import max_code
from reelquant.ops.implementation import Implementation, takes_triton
from reelquant.ops.rounding_error.reference import rounding_error_reference

__all__ = ["Implementation", "rounding_error"]

LARGEST_STRIDED_ROW = 2**31 - 1
"""The kernel counts in 32 bits within a row."""


def rounding_error(weight: Tensor, *, bits: int, implementation: Implementation = "auto") -> Tensor:
    """`fake_quantize(W, bits, 1) - W` of a weight, in its dtype.

    Args:
        weight: W, bf16, fp16 or fp32 `[out, in]`, not empty, with any strides.
        bits: 2 to 8.
        implementation: `auto` takes the kernel where it runs.

    Returns: `[out, in]`, contiguous. No gradient. A row with NaN or inf is NaN throughout. The kernel gives the bits that the
        reference gives on a CPU; on CUDA torch divides by multiplying with the reciprocal: a scale may be a last place beside.
    Raises: ValueError for bits, shapes or dtypes that do not fit, or `triton` where the kernel does not run.
    """
    max_code(bits)
    if weight.ndim != 2 or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not weight.numel():
        raise ValueError(
            f"weight must be bf16, fp16 or fp32 [out, in], not empty, got {weight.dtype} {list(weight.shape)}"
        )
    with torch.no_grad():
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        if takes_triton(implementation, weight.device, unsuited=_unsuited(weight), on_meta=True):
            if weight.is_meta:
                return out
            from reelquant.ops.rounding_error.kernel import launch_rounding_error

            return launch_rounding_error(weight, bits=bits, out=out)
        return rounding_error_reference(weight, bits=bits, out=out)


def _unsuited(weight: Tensor) -> str | None:
    if weight.dtype == torch.float32:
        return "the weight is torch.float32, not torch.bfloat16 or torch.float16"
    if weight.shape[1] * weight.stride(1) > LARGEST_STRIDED_ROW:
        return f"{weight.shape[1]} columns {weight.stride(1)} apart are more than it counts, {LARGEST_STRIDED_ROW}"
    return None
