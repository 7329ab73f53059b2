"""What one H100 80GB reaches at best, measured: rates that others are compared with.

All but the copy: 2026-11-22, torch 2.11.0+cu130, medians. The card's specification is higher (989 TFLOP/s in bf16, 1979 in
FP8 and INT8, 3350 GB/s), but no product of these sizes comes near it within the card's power limit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceiling:
    """The best rate that was measured for one kind of work."""

    rate: float
    """In `unit`."""
    unit: str
    """TFLOP/s, TOPS or GB/s."""
    source: str
    """What was measured."""

    @property
    def per_second(self) -> float:
        """Operations or bytes."""
        return self.rate * (1e9 if self.unit == "GB/s" else 1e12)


BF16 = Ceiling(780.0, "TFLOP/s", "bf16 `torch.mm` of 8192 x 8192 x 8192")
FP8 = Ceiling(1432.0, "TFLOP/s", "FP8 `torch._scaled_mm`, the best of six shapes of HunyuanVideo's blocks")
INT8 = Ceiling(
    1432.0, "TOPS", "that of FP8: the tensor cores' rate for both is the same, and no INT8 product was faster"
)
COPY = Ceiling(3016.0, "GB/s", "device copy of 2 GiB, read and written (`linear_kernels.json`)")
DENSE_ATTENTION = Ceiling(648.0, "TFLOP/s", "cuDNN, 57,856 tokens, 24 heads of 128, no mask")
