"""Both terms of a refresh: the kernel against float64, and the two implementations against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from reelquant.ops.residual_factorization.op import ITERATIONS, Factors, factorize_refresh
from reelquant.ops.residual_factorization.reference import factorize_refresh_reference
from tests.errors import raises

Launch = Callable[..., tuple[Factors, Factors | None]]


class Case(NamedTuple):
    heads: int
    length: int
    dim: int
    rank: int
    dtype: torch.dtype = torch.bfloat16


CASES = [Case(2, 150, 64, 16), Case(3, 37, 16, 3, torch.float16), Case(1, 65, 128, 20), Case(2, 1, 32, 4)]
GPU_CASES = [
    Case(24, 4133, 128, 16),
    Case(24, 4133, 128, 32, torch.float16),
    Case(48, 1025, 64, 8),
    Case(2, 57_661, 128, 16),
    Case(300, 65, 16, 16),
]


def outputs(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """Attention two ways, of which one misses a part with a decaying spectrum and loud channels; views of wider rows."""
    heads, length, d, _, dtype = case
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, length, heads + 1, d, generator=generator).transpose(1, 2)
    missed = torch.randn(heads, length, min(24, d), generator=generator) * 0.8 ** torch.arange(min(24, d))
    missed = missed @ torch.randn(heads, min(24, d), d, generator=generator)
    missed[..., ::7] *= 4
    dense = wide[0, :heads] + missed
    return dense.to(dtype).transpose(0, 1).contiguous().transpose(0, 1), wide[1, :heads].to(dtype)


def lost_energy(residual: Tensor, factors: Factors) -> float:
    """Share of what the best projection of this rank captures of float64 `residual` and the factors do not; worst head."""
    rank = factors.directions.shape[2]
    best = torch.linalg.svdvals(residual)[:, :rank].square().sum(1)
    left = residual - factors.rows.double() @ factors.directions.double().mT
    captured = residual.square().sum((1, 2)) - left.square().sum((1, 2))
    return float((1 - captured / best.clamp_min(1e-300)).max())


def check(case: Case, launch: Launch, *, seed: int, device: str, tolerance: float = 3e-3) -> None:
    first, second = outputs(case, seed), outputs(case, seed + 100)
    dense, sparse = (x.to(device) for x in first)
    old, none = launch(dense, sparse, case.rank, before=None, iterations=ITERATIONS)
    assert none is None
    again = launch(*(x.to(device) for x in second), case.rank, before=old, iterations=ITERATIONS)
    assert again[1] is not None
    old, new, change = (Factors(*(x.cpu() for x in f)) for f in (old, again[0], again[1]))
    residual = second[0].double() - second[1].double()
    expected = residual - old.rows.double() @ old.directions.double().mT
    for target, found in ((first[0].double() - first[1].double(), old), (residual, new), (expected, change)):
        assert (found.rows.dtype, found.directions.dtype) == (case.dtype, torch.float32)
        gram = found.directions.double().mT @ found.directions.double()
        assert float((gram - torch.eye(case.rank)).abs().max()) < 1e-6
        lost = lost_energy(target, found)
        assert lost < 2e-4, lost  # rows in 16 bits alone: 1e-5
        exact = target @ found.directions.double()
        error = float((found.rows.double() - exact).norm() / exact.norm())
        assert error < tolerance, error  # rounding rows to bf16 alone: 1.7e-3


def interpreted_kernel() -> None:
    """Runs where Triton interprets."""
    from reelquant.ops.residual_factorization.kernel import launch_factorize_refresh

    for seed, case in enumerate(CASES):
        check(
            case, launch_factorize_refresh, seed=seed, device="cpu", tolerance=1e-2
        )  # it cuts off instead of rounding


def test_interpreted(interpreted: Callable[[str, str], None]) -> None:
    interpreted(__file__, "interpreted_kernel")


@pytest.mark.parametrize("case", CASES)
def test_reference(case: Case) -> None:
    check(case, factorize_refresh_reference, seed=1, device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_kernel(case: Case) -> None:
    from reelquant.ops.residual_factorization.kernel import launch_factorize_refresh

    check(case, launch_factorize_refresh, seed=2, device="cuda")


@pytest.mark.gpu
def test_kernel_names_a_broken_head_and_no_other() -> None:
    dense, sparse = (x.cuda() for x in outputs(GPU_CASES[0], 3))
    dense[5, 17, 3] = torch.nan
    found, _ = factorize_refresh(dense, sparse, 16, implementation="triton")
    broken = ~found.directions.isfinite().all(dim=(1, 2))
    assert broken.nonzero().flatten().tolist() == [5]


def test_bad_arguments() -> None:
    dense, sparse = outputs(CASES[0], 0)
    before = Factors(torch.zeros(2, 150, 8), torch.zeros(2, 64, 8))
    with raises(ValueError, "rank", 65, 64):
        factorize_refresh(dense, sparse, 65)
    with raises(ValueError, [2, 150, 16], [2, 64, 16], [2, 150, 8], [2, 64, 8]):
        factorize_refresh(dense, sparse, 16, before=before)
    with raises(ValueError, "triton", "cpu"):
        factorize_refresh(dense, sparse, 16, implementation="triton")
    with raises(ValueError, "dense", "sparse", (2, 150, 64), (1, 150, 64)):
        factorize_refresh(dense, sparse[:1], 16)
