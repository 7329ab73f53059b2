from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reelquant.ops.residual_factorization import reference
from reelquant.ops.residual_factorization.op import factorize
from tests.errors import raises

SPECTRA: dict[str, Callable[[Tensor, int], Tensor]] = {  # singular values of a residual with n of them
    "harmonic": lambda i, n: 1 / (i + 1),
    "geometric": lambda i, n: 0.7**i,
    "slow": lambda i, n: (i + 1) ** -0.3,
    "flat": lambda i, n: torch.ones_like(i),
    "one_large": lambda i, n: torch.where(i == 0, torch.ones_like(i), 0.05),
    "deficient": lambda i, n: torch.where(i < max(1, n // 4), 1 / (i + 1), torch.zeros_like(i)),
}


def drawn(spectrum: str, *, length: int, dim: int, seed: int, heads: int = 2) -> Tensor:
    """float64 [H, L, D] with these singular values and random directions."""
    generator = torch.Generator().manual_seed(seed)
    if spectrum == "noise":
        return torch.randn(heads, length, dim, dtype=torch.float64, generator=generator)
    n = min(length, dim)
    left, right = (
        torch.linalg.qr(torch.randn(heads, size, n, dtype=torch.float64, generator=generator))[0]
        for size in (length, dim)
    )
    result: Tensor = left * SPECTRA[spectrum](torch.arange(n, dtype=torch.float64), n) @ right.mT
    return result


@functools.cache
def drawn_with_values(spectrum: str, length: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """`drawn`, and its singular values, which take longer than all else; made once for all ranks. Read only."""
    residual = drawn(spectrum, length=length, dim=dim, seed=seed)
    return residual, torch.linalg.svdvals(residual)


def lost_energy(residual: Tensor, directions: Tensor, values: Tensor | None = None) -> float:
    """Share of the energy of the best projection of this rank that `directions` miss, worst head."""
    values = torch.linalg.svdvals(residual) if values is None else values
    best = values[:, : directions.shape[2]].square().sum(1)
    return float((1 - (residual @ directions.double()).square().sum((1, 2)) / best).max())


@pytest.mark.parametrize("spectrum", [*SPECTRA, "noise"])
@pytest.mark.parametrize(("length", "dim"), [(1, 64), (37, 64), (300, 128), (2000, 128), (100, 7)])
@pytest.mark.parametrize("rank", [1, 8, 16, 128])
def test_captures_what_an_svd_captures(spectrum: str, length: int, dim: int, rank: int) -> None:
    rank = min(rank, dim)
    for seed in range(2):
        residual, values = drawn_with_values(spectrum, length, dim, seed)
        rows, directions = factorize(residual.float(), rank)
        assert (rows.dtype, rows.shape) == (torch.float32, (2, length, rank))
        assert (directions.dtype, directions.shape) == (torch.float32, (2, dim, rank))
        lost = lost_energy(residual, directions, values)
        assert lost < 1e-4, lost  # measured: 2.5e-5 for `harmonic`, 6e-6 `geometric`, below 1e-7 elsewhere
        gram = directions.double().mT @ directions.double()
        assert float((gram - torch.eye(rank)).abs().max()) < 1e-6  # measured: 9e-8
        torch.testing.assert_close(rows, residual.float() @ directions)


@pytest.mark.parametrize(("length", "dim", "rank"), [(37, 64, 8), (32, 16, 4), (300, 128, 16), (2000, 128, 1)])
def test_is_the_projection_of_an_svd_on_noise(length: int, dim: int, rank: int) -> None:
    for seed in range(3):
        residual = drawn("noise", length=length, dim=dim, seed=seed)
        rows, directions = factorize(residual.float(), rank)
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        expected = left[..., :rank] * values[:, None, :rank] @ right[:, :rank]
        error = float((rows.double() @ directions.double().mT - expected).norm() / expected.norm())
        assert error < 1e-5, error  # measured: 2e-6


@pytest.mark.parametrize("shape", [(3, 1, 64), (3, 37, 64), (2, 500, 128), (1, 20_000, 16)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_exact_for_what_has_the_rank(shape: tuple[int, int, int], rank: int) -> None:
    heads, length, dim = shape
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        residual = torch.randn(heads, length, rank, generator=generator) @ torch.randn(
            heads, rank, dim, generator=generator
        )
        rows, directions = factorize(residual, rank)
        error = float((rows @ directions.mT - residual).norm() / residual.norm())
        assert error < 2e-6, error  # measured: 2e-7


def test_heads_of_zeros_and_of_any_scale() -> None:
    residual = drawn("harmonic", length=50, dim=32, seed=0, heads=4).float()
    scales = torch.tensor([0.0, 1e-25, 1.0, 1e25]).view(4, 1, 1)
    rows, directions = factorize(residual * scales, 8)
    assert bool(rows[0].eq(0).all())
    assert bool(directions.isfinite().all())
    for head in (1, 2, 3):
        assert lost_energy(residual[head : head + 1].double(), directions[head : head + 1]) < 1e-4


def test_bf16_and_tiles_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    residual = drawn("harmonic", length=101, dim=24, seed=1).bfloat16()
    rows, directions = factorize(residual, 5)
    assert rows.dtype == torch.float32
    assert lost_energy(residual.double(), directions) < 1e-4
    monkeypatch.setattr(reference, "TILE_ROWS", 10)
    strided = residual.transpose(0, 1).contiguous().transpose(0, 1)
    tiled_rows, tiled = factorize(strided, 5)
    torch.testing.assert_close(tiled_rows @ tiled.mT, rows @ directions.mT, rtol=1e-4, atol=1e-5)
    assert factorize(residual.double(), 5)[0].dtype == torch.float64


def test_the_same_every_time_and_no_gradient() -> None:
    residual = torch.randn(2, 40, 16, requires_grad=True)
    first, second = factorize(residual, 3), factorize(residual, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not first[0].requires_grad
    alone = factorize(residual[1:], 3)
    torch.testing.assert_close(alone[1], first[1][1:])


def test_a_broken_head_breaks_no_other() -> None:
    residual = torch.randn(2, 40, 16)
    residual[0, 3, 4] = torch.nan
    rows, _ = factorize(residual, 3)
    assert bool(rows[0].isnan().any())
    assert bool(rows[1].isfinite().all())


def test_errors() -> None:
    residual = torch.randn(2, 5, 4)
    with raises(ValueError, "rank", 5, 4):
        factorize(residual, 5)
    with raises(ValueError, "rank", 0):
        factorize(residual, 0)
    with raises(ValueError, "iterations", 0):
        factorize(residual, 2, iterations=0)
    with raises(ValueError, "residual", "[H, L, D]", (5, 4)):
        factorize(residual[0], 2)
    with raises(ValueError, "residual", torch.int64):
        factorize(residual.long(), 2)
