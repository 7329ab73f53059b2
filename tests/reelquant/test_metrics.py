from __future__ import annotations

import math

import pytest
import torch

from reelquant import metrics
from reelquant.metrics import psnr_db, relative_error, sqnr_db, trajectory_sqnr_db, velocity_sqnr_db
from tests.errors import raises


def test_known_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PIECE_ELEMENTS", 7)
    reference = torch.full((3, 11), 2.0)
    assert sqnr_db(reference, reference * 1.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(torch.zeros(3, 11), torch.full((3, 11), 0.1)) == pytest.approx(20.0, abs=1e-5)
    a, b = torch.zeros(4, 5, dtype=torch.uint8), torch.full((4, 5), 255, dtype=torch.uint8)
    assert psnr_db(a, b, 255) == pytest.approx(0.0)
    assert psnr_db(b, a, 255) == pytest.approx(0.0)


def test_a_small_difference_in_large_values_is_not_lost() -> None:
    reference = torch.full((1 << 16,), 1000.0, dtype=torch.float64)
    assert sqnr_db(reference, reference + 1e-6) == pytest.approx(180.0, abs=0.01)


def test_edges() -> None:
    x = torch.randn(5)
    assert sqnr_db(x, x) == math.inf
    assert psnr_db(x, x) == math.inf
    assert sqnr_db(0 * x, x) == -math.inf
    assert math.isnan(sqnr_db(x, x * math.nan))
    assert math.isnan(psnr_db(x * math.nan, x))
    original = x.double().clone()
    sqnr_db(original, x)
    assert torch.equal(original, x.double())


def test_errors() -> None:
    with raises(ValueError, "reference", "x", (2,), (3,)):
        sqnr_db(torch.ones(2), torch.ones(3))
    with raises(ValueError, "a", "b", (0,)):
        psnr_db(torch.empty(0), torch.empty(0))
    with raises(ValueError, "data_range", 0):
        psnr_db(torch.ones(2), torch.ones(2), 0)


def test_velocity_sqnr_is_the_ratio_of_energies_whatever_the_dtype() -> None:
    reference = torch.randn(3, 5, 7)
    noise = torch.randn(3, 5, 7)
    noise *= 0.05 * reference.norm() / noise.norm()
    assert velocity_sqnr_db(reference, reference + noise) == pytest.approx(-20 * math.log10(0.05), abs=1e-4)
    assert velocity_sqnr_db(reference, reference) == math.inf
    assert velocity_sqnr_db(reference.bfloat16(), (reference + noise).bfloat16()) == pytest.approx(26.0, abs=0.2)
    # Float32 sums would lose the error of all but the first element.
    large = torch.cat([torch.tensor([1e6]), torch.ones(1 << 10)])
    assert velocity_sqnr_db(large, large + 1) == pytest.approx(10 * math.log10((1e12 + 1024) / 1025), abs=1e-9)
    with raises(ValueError, (3, 5, 7), (3, 5, 6)):
        velocity_sqnr_db(reference, reference[..., :6])


def test_relative_error_is_what_velocity_sqnr_has_in_decibels() -> None:
    reference, other = torch.randn(4, 9), torch.randn(4, 9)
    assert -10 * math.log10(relative_error(reference, other)) == pytest.approx(velocity_sqnr_db(reference, other))
    assert relative_error(reference, reference) == 0.0
    assert relative_error(torch.zeros(2), torch.ones(2)) == math.inf


def test_a_trajectory_weighs_errors_not_decibels() -> None:
    errors = [1e-2, 1e-4, 1e-3]
    assert trajectory_sqnr_db(errors) == pytest.approx(-10 * math.log10((1e-2 + 1e-4 + 1e-3) / 3))
    assert trajectory_sqnr_db(errors, [0.0, 2.0, 0.0]) == pytest.approx(40.0)
    assert trajectory_sqnr_db(errors, [1.0, 0.0, 1.0]) == pytest.approx(-10 * math.log10(5.5e-3))
    assert trajectory_sqnr_db([0.0, 0.0], [1.0, 3.0]) == math.inf
    for bad in ([1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]):
        with raises(ValueError, "weights", bad):
            trajectory_sqnr_db(errors, bad)
    with raises(ValueError, "0 errors"):
        trajectory_sqnr_db([])
