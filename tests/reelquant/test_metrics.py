from __future__ import annotations

import math

import pytest
import torch

from reelquant import metrics
from reelquant.metrics import psnr_db, sqnr_db
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
