"""Drift of the residual: against float64 definitions, and against schedules tried one by one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reelquant.attention.sparse_spec import SparseAttentionSpec, dense_threshold
from reelquant.calibration.residual_drift import (
    MOST_LAGS,
    MeasuredResidual,
    ResidualDrift,
    measured_residual,
    missed_rows,
    placed_refreshes,
)
from reelquant.noise_schedule import shifted_levels
from reelquant.ops.band_attention.op import band_attention, dense_attention
from reelquant.settings.attention import Residual
from reelquant.tokens import TokenLayout
from tests.errors import raises

STEPS = 12
LEVELS = shifted_levels(STEPS, 3.0)
SPEC = SparseAttentionSpec(
    density=0.3,
    head_kinds={"a": "st"},
    dense_above=dense_threshold(2, LEVELS, refreshes=True),
    interval=4,
    residual=Residual(order=1, rank=8),
)


def wandering(seed: int, steps: int = STEPS, *, speed: float = 0.5) -> Tensor:
    """Residuals `[T, H, R, D]` that move by less and less, and shrink."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(steps, 2, 5, 3, generator=generator, dtype=torch.float64)
    rates = speed ** torch.arange(steps, dtype=torch.float64)
    return (moves * rates.view(-1, 1, 1, 1)).cumsum(dim=0) * torch.linspace(1, 0.6, steps).view(-1, 1, 1, 1)


def drift_of(*residuals: Tensor) -> ResidualDrift:
    drift = ResidualDrift(len(residuals[0]))
    for index, found in enumerate(residuals):
        drift.add(found, [2.0 + index + 0.1 * step for step in range(len(found))])
    return drift


@pytest.mark.parametrize("num_text", [0, 7])
def test_missed_rows_are_those_of_the_band(num_text: int) -> None:
    layout, width = TokenLayout(3, 4, 5, num_text), 9
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, layout.num_tokens, 8, generator=generator) for _ in range(3))
    rows = torch.tensor([0, 17, 31, 59])
    missed, full = missed_rows(q, k, v, kinds="sts", layout=layout, width=width, rows=rows)
    dense = dense_attention(q.double(), k.double(), v.double())
    banded = band_attention(q.double(), k.double(), v.double(), kinds="sts", layout=layout, width=width)
    torch.testing.assert_close(full.double(), dense[:, rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(missed.double(), (dense - banded)[:, rows], rtol=1e-5, atol=1e-6)


def test_errors_and_gains_are_their_definitions() -> None:
    blocks = [wandering(0), wandering(1, speed=0.8)]
    drift = drift_of(*blocks)
    norms = [[2.0 + index + 0.1 * step for step in range(STEPS)] for index in range(2)]

    def error(r: int, t: int, beta: float) -> float:
        parts = [float((b[t] - beta * b[r]).square().sum()) / n[t] for b, n in zip(blocks, norms, strict=True)]
        return sum(parts) / 2

    for beta in (1.0, 0.7):
        found = drift.errors(beta)
        for r, t in ((0, 3), (4, 5), (2, 11)):
            assert float(found[r, t]) == pytest.approx(error(r, t, beta), rel=1e-9)
    first = 3
    gains = drift.gain(first)
    assert len(gains) == STEPS - first - 1

    def total(lag: int, beta: float) -> float:
        return sum(error(r, r + lag, beta) for r in range(first, STEPS - lag))

    for lag, gain in enumerate(gains, start=1):
        assert total(lag, gain) <= min(total(lag, gain + change) for change in (-1e-3, 1e-3)), lag
    assert len(ResidualDrift(60).gain(0)) == MOST_LAGS
    assert ResidualDrift(3).gain(0) == (1.0, 1.0), "nothing that could be damped"
    assert ResidualDrift(3).gain(2) == ()


@pytest.mark.parametrize("num", [1, 2, 3, 4, 7, 8])
def test_refreshes_are_placed_as_by_trying_all(num: int) -> None:
    errors = torch.rand(8, 8, generator=torch.Generator().manual_seed(num), dtype=torch.float64)

    def left(refreshes: tuple[int, ...]) -> float:
        return sum(float(errors[max(r for r in refreshes if r <= t), t]) for t in range(8) if t not in refreshes)

    every = [(0, *rest) for rest in itertools.combinations(range(1, 8), num - 1)]
    found = placed_refreshes(errors, num)
    assert len(found) == num
    assert math.isclose(left(tuple(found)), min(map(left, every)), abs_tol=1e-12)


def test_refreshes_beyond_the_steps_are_refused() -> None:
    for num in (0, 4):
        with raises(ValueError, "refreshes", num, 3):
            placed_refreshes(torch.zeros(3, 3), num)


def test_what_is_measured_makes_the_error_smaller_at_the_same_density() -> None:
    drift = drift_of(wandering(0), wandering(1, speed=0.8))
    both = measured_residual(drift, SPEC, LEVELS, gain=True, placed=True)
    spec = both.applied(SPEC)
    kinds = [s.schedule(LEVELS) for s in (SPEC, spec)]
    assert [k.count("sparse") for k in kinds] == [8, 8]
    assert [step for step, kind in enumerate(kinds[1]) if kind == "refresh"] == list(both.refresh_steps or ())
    assert kinds[1][:2] == ["dense", "refresh"], "the dense first steps stay"
    assert spec.residual.gain == both.gain
    assert MeasuredResidual.from_dict(both.to_dict()) == both
    gain = measured_residual(drift, SPEC, LEVELS, gain=True, placed=False)
    placed = measured_residual(drift, SPEC, LEVELS, gain=False, placed=True)
    assert (gain.refresh_at, placed.gain, gain.applied(SPEC).interval) == (None, None, 4)
    assert gain.error_before == placed.error_before == both.error_before
    assert both.error_after < min(gain.error_after, placed.error_after)
    assert max(gain.error_after, placed.error_after) < both.error_before
    # By hand: refreshes at 1, 5 and 9 with a residual of order 1.
    by_hand = drift.errors()
    lasts = {2: 1, 3: 1, 4: 1, 6: 5, 7: 5, 8: 5, 10: 9, 11: 9}
    assert both.error_before == pytest.approx(sum(float(by_hand[r, t]) for t, r in lasts.items()) / 8)


def test_an_adjacent_residual_keeps_its_dense_first_steps() -> None:
    adjacent = replace(SPEC, residual=Residual(order=2, rank=8, extrapolation="adjacent"))
    drift = drift_of(wandering(2))
    found = measured_residual(drift, adjacent, LEVELS, gain=False, placed=True).applied(adjacent)
    assert found.schedule(LEVELS).count("sparse") == adjacent.schedule(LEVELS).count("sparse")
