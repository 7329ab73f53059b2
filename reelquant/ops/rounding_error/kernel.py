"""What rounding changes in a weight, in Triton: bound by memory.

A program takes a row and walks it twice, in blocks: for its largest magnitude, then, out of the cache, for its errors. An error
is a difference of two numbers that are nearly the same: a product that is not rounded before gives another one, hence no fused
multiply-add.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reelquant.ops.architecture import launching
from reelquant.ops.fake_quantization.reference import SMALLEST_SCALE, max_code

_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and subtracted again it leaves an integer, ties to even."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rounding_error(
    weight, out, row_stride, column_stride, num_columns, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    row_of_weight, row_of_out = weight + row * row_stride, out + row * num_columns
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        places = start + column
        x = tl.load(row_of_weight + places * column_stride, mask=places < num_columns, other=0.0)
        largest = _larger(largest, tl.abs(x.to(tl.float32)))
    scale = tl.math.div_rn(tl.reduce(largest, 0, _larger), LARGEST * 1.0)
    scale = _larger(scale, _SMALLEST_SCALE)
    for start in range(0, num_columns, BLOCK):
        places = start + column
        inside = places < num_columns
        x = tl.load(row_of_weight + places * column_stride, mask=inside, other=0.0).to(tl.float32)
        codes = tl.math.div_rn(x, scale) + _ROUNDING - _ROUNDING
        tl.store(row_of_out + places, (codes * scale - x).to(out.dtype.element_ty), mask=inside)


def launch_rounding_error(weight: Tensor, *, bits: int, out: Tensor, block: int = 1024, num_warps: int = 4) -> Tensor:
    """Fills `out`; arguments as checked by `op.rounding_error`. `block`: columns at a time."""
    num_rows, num_columns = weight.shape
    with launching(weight):
        _rounding_error[(num_rows,)](
            weight,
            out,
            *weight.stride(),
            num_columns,
            LARGEST=max_code(bits),
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return out
