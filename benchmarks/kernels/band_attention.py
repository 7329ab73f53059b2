"""``attention``: under the band in 16 bits.

- dense: torch's scaled_dot_product_attention by cuDNN and by FlashAttention 2, cuDNN first and last (the clock drifts),
- band: spatial, temporal and mixed heads by density, and FlexAttention,
- corrected: the same with one or two rank-16 corrections in its epilogue, and one applied after it,
- refresh: dense and band in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.attention_problem import Problem, add, drawn, mixed, sampled_error, worse_of_both
from benchmarks.kernels.bench import Bench
from reelquant.ops.band_attention.launch import band_attention_triton, dense_and_band_triton
from reelquant.ops.band_attention.reference import Correction, corrected
from reelquant.tokens import band_width


def measure(bench: Bench) -> None:
    """All cases on the same tensors."""
    problem = drawn(bench)
    add_dense(bench, problem)
    add_dense(bench, problem, SDPBackend.FLASH_ATTENTION)
    for density, mixes in ((0.15, ("s", "t", "st")), (0.25, ("s", "t", "st")), (0.4, ("st",))):
        for mix in mixes:
            add_band(bench, problem, density, mix)
    _add_corrected(bench, problem)
    _add_refreshes(bench, problem)
    add_dense(bench, problem)
    _add_flex(bench, problem)


def add_dense(bench: Bench, problem: Problem, backend: SDPBackend = SDPBackend.CUDNN_ATTENTION) -> None:
    """Dense attention by one backend of torch; recorded as failed where that does not take the tensors."""
    q, k, v = (x.unsqueeze(0) for x in problem[:3])

    def call() -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, k, v)[0]

    error = sampled_error(problem, "s" * bench.sizes.heads, problem.layout.num_video)
    name = "dense cudnn" if backend == SDPBackend.CUDNN_ATTENTION else "dense fa2"
    add(bench, name, call, problem.dense_flop, error=error)


def add_band(bench: Bench, problem: Problem, density: float, mix: str) -> None:
    """Heads of the kinds `mix` under the band of a density."""
    kinds, width = mixed(bench.sizes.heads, mix), band_width(problem.layout, density)
    call = partial(band_attention_triton, *problem[:3], kinds=kinds, layout=problem.layout, width=width)
    error = sampled_error(problem, kinds, width)
    add(bench, "band triton", call, problem.band_flop(width), density=density, kinds=mix, error=error)


def corrections_of(problem: Problem) -> tuple[Correction, ...]:
    """Two of rank 16."""
    heads, _, head_dim = problem.q.shape
    return tuple(
        Correction(
            torch.randn_like(problem.q[..., :16]), torch.randn(heads, head_dim, 16, device=problem.q.device), scale
        )
        for scale in (1.0, 0.5)
    )


def _add_corrected(bench: Bench, problem: Problem) -> None:
    heads, tokens, head_dim = problem.q.shape
    kinds, width = mixed(heads, "st"), band_width(problem.layout, 0.15)
    terms = corrections_of(problem)
    band: Callable[..., Any] = partial(
        band_attention_triton, *problem[:3], kinds=kinds, layout=problem.layout, width=width
    )
    for num in (1, 2):
        flop = problem.band_flop(width) + 2.0 * num * heads * tokens * head_dim * 16
        error = sampled_error(problem, kinds, width, terms[:num])
        call = partial(band, corrections=terms[:num])
        add(bench, "band corrected", call, flop, density=0.15, kinds="st", corrections=num, error=error)
    after = lambda: corrected(band(), terms[:1])  # noqa: E731
    add(bench, "band, then corrected", after, problem.band_flop(width), density=0.15, kinds="st", corrections=1)


def _add_refreshes(bench: Bench, problem: Problem) -> None:
    width = band_width(problem.layout, 0.15)
    for mix in ("s", "st"):
        kinds = mixed(bench.sizes.heads, mix)
        both = [sampled_error(problem, kinds, one) for one in (problem.layout.num_video, width)]
        call = partial(dense_and_band_triton, *problem[:3], kinds=kinds, layout=problem.layout, width=width)
        error = partial(worse_of_both, *both)
        add(bench, "refresh, one pass", call, problem.dense_flop, density=0.15, kinds=mix, error=error)


def _add_flex(bench: Bench, problem: Problem) -> None:
    from reelquant.ops.band_attention.flex import band_attention_flex

    kinds = "s" * bench.sizes.heads
    for density in (0.15, 0.25):
        width = band_width(problem.layout, density)
        call = partial(band_attention_flex, *problem[:3], kinds=kinds, layout=problem.layout, width=width)
        error = sampled_error(problem, kinds, width)
        add(bench, "band flex", call, problem.band_flop(width), density=density, kinds="s", error=error)
