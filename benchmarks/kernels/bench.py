"""The benchmark that all kernels run in: sizes, device, ceilings and rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import L2_BYTES, Recorder, Row, timed, timed_in_graph
from reelquant.tokens import TokenLayout


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and its video."""

    grid: tuple[int, int, int] = (16, 45, 80)
    """Tokens of the video: frames, rows, columns."""
    text: int = 256
    heads: int = 24
    head_dim: int = 128
    product: int = 8192
    """Side of the product whose rate is the ceiling."""
    copy: int = 2**29
    """Floats of the copy whose rate is the ceiling."""

    @property
    def layout(self) -> TokenLayout:
        """Video and text."""
        return TokenLayout(*self.grid, self.text)

    @property
    def video(self) -> int:
        """Tokens of the video."""
        return self.layout.num_video

    @property
    def joint(self) -> int:
        """Tokens of video and text."""
        return self.layout.num_tokens

    @property
    def width(self) -> int:
        """Hidden size."""
        return self.heads * self.head_dim


FULL = Sizes()
"""HunyuanVideo's at 720 x 1280, 61 frames."""
SMALL = Sizes(grid=(3, 7, 9), text=8, heads=2, head_dim=64, product=64, copy=2**12)
"""For a CPU, where it shows that the script works."""


class Bench:
    """Measures kernels one after the other."""

    def __init__(self, sizes: Sizes, device: torch.device, budget_s: float) -> None:
        self.sizes, self.device = sizes, device
        self.record = Recorder(budget_s)
        self.copy_gb_s = self.product_tops = float("nan")

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: bf16; float16 on a CPU, whose interpreter of Triton has no bf16."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float16

    def add(self, group: str, case: str, variant: str, call: Callable[[], Row]) -> Row:
        """Measures one variant of a case."""
        return self.record.add({"group": group, "case": case, "variant": variant}, call)

    def measure_ceilings(self) -> None:
        """GB/s of a device copy, bytes read and written, and TFLOP/s of a 16-bit product."""
        side, floats = self.sizes.product, self.sizes.copy

        def copy() -> Row:
            source = self.randn(floats, dtype=torch.float32)
            target = torch.empty_like(source)
            times = self.timed(lambda: target.copy_(source))
            return {**times, "gb_s": 2 * source.nbytes / times["ms"] / 1e6}

        def product() -> Row:
            a, b = (self.randn(side, side) for _ in range(2))
            times = self.timed(lambda: torch.mm(a, b))
            return {**times, "tops": 2 * side**3 / times["ms"] / 1e9}

        copied = self.add("ceiling", f"copy {floats * 4 / 2**30:.3g} GiB", "torch", copy)
        multiplied = self.add("ceiling", f"bf16 {side}^3", "torch.mm", product)
        self.copy_gb_s, self.product_tops = copied.get("gb_s", float("nan")), multiplied.get("tops", float("nan"))

    def timed(self, call: Callable[[], object]) -> Row:
        """See `harness.timed`."""
        return timed(call, self.device)

    def timed_in_graph(self, calls: list[Callable[[], object]]) -> Row:
        """See `harness.timed_in_graph`."""
        return timed_in_graph(calls, self.device)

    def rated(self, row: Row, operations: float) -> Row:
        """`row` with TOPS and their share of the ceiling."""
        rate = operations / row["ms"] / 1e9
        return {**row, "tops": rate, "share": rate / self.product_tops}

    def moved(self, row: Row, num_bytes: float) -> Row:
        """`row` with GB/s and their share of the ceiling."""
        rate = num_bytes / row["ms"] / 1e6
        return {**row, "gb_s": rate, "share": rate / self.copy_gb_s}

    def num_copies(self, num_bytes: int) -> int:
        """Copies of a buffer that the L2 cache does not hold; one on a CPU."""
        return 1 + (L2_BYTES // num_bytes if self.device.type == "cuda" else 0)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Gaussian values."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def loud(self, num_tokens: int, d: int) -> Tensor:
        """Gaussian activations, every 128th channel ten times as loud."""
        x = self.randn(num_tokens, d)
        x[:, ::128] *= 10
        return x

    def free(self) -> None:
        """Gives unused memory back."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


Kernel = Callable[[Bench], None]
"""Measures all cases of a kernel."""
Options = dict[str, Any]
