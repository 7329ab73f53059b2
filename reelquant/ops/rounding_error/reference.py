"""What rounding changes in a weight, in plain torch: what defines the result of the kernel."""

from __future__ import annotations

from torch import Tensor

from reelquant.ops.fake_quantization.op import fake_quantize
from reelquant.ops.fake_quantization.reference import max_code

TILE_VALUES = 2**22
"""Values at a time: bounds the float32 intermediates."""


def rounding_error_reference(weight: Tensor, *, bits: int, out: Tensor) -> Tensor:
    """See `op.rounding_error`; fills `out`."""
    tile_rows = max(1, TILE_VALUES // weight.shape[1])
    for part, target in zip(weight.split(tile_rows), out.split(tile_rows), strict=True):
        exact = part.float()
        target.copy_(fake_quantize(exact, 1.0, max_code(bits), 1) - exact)
    return out
