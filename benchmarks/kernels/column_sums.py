"""``sums``: both passes of the column sums of the attention map, all of it, and the reference."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.attention_problem import add, drawn
from benchmarks.kernels.bench import Bench
from reelquant.ops.column_sums import kernel
from reelquant.ops.column_sums.op import column_sums


def measure(bench: Bench) -> None:
    """All cases on the same tensors."""
    problem = drawn(bench)
    q, k, half = problem.q, problem.k, problem.dense_flop / 2
    lse = kernel.row_normalizers(q, k)
    expected = column_sums(q, k, implementation="reference").double()

    def error(sums: Tensor) -> float:
        return float((sums.double() - expected).norm() / expected.norm())

    add(bench, "sums pass 1", partial(kernel.row_normalizers, q, k), half)
    second = partial(kernel.key_sums, q, k, lse)
    add(bench, "sums pass 2", second, half, error=lambda sums: error(sums.sum(0, dtype=torch.float64)))
    add(bench, "sums", partial(kernel.column_sums_triton, q, k), 2 * half, error=error)
    reference = partial(column_sums, q, k, implementation="reference")
    add(bench, "sums reference", reference, 2 * half, once=True)
