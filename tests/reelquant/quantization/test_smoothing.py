from __future__ import annotations

import pytest
import torch

from reelquant.metrics import sqnr_db
from reelquant.quantization.quantizer import fake_quantize
from reelquant.quantization.smoothing import smoothing_scale
from tests.errors import raises


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_is_equation_4(alpha: float) -> None:
    activation, weight = torch.rand(37) + 0.01, torch.rand(37) + 0.01
    torch.testing.assert_close(smoothing_scale(activation, weight, alpha), activation**alpha / weight ** (1 - alpha))


def test_half_gives_both_sides_one_maximum() -> None:
    activation, weight = torch.tensor([100.0, 1.0, 0.01]), torch.tensor([0.1, 0.2, 0.4])
    scale = smoothing_scale(activation, weight)
    torch.testing.assert_close(activation / scale, weight * scale)


def test_dead_and_extreme_channels() -> None:
    activation = torch.tensor([0.0, 2.0, 0.0, 1e-38, 3e38, 1e-45])
    weight = torch.tensor([1.0, 0.0, 0.0, 3e38, 1e-38, 1e-45])
    scale = smoothing_scale(activation, weight)
    assert scale[:3].tolist() == [1.0, 1.0, 1.0]
    assert scale.dtype == torch.float32
    assert bool(((scale >= 0.9e-5) & (scale <= 1.1e5)).all())


def test_outliers_cost_less() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator)
    x[:, 5] *= 60
    weight = torch.randn(32, 64, generator=generator)
    scale = smoothing_scale(x.abs().amax(0), weight.abs().amax(0))
    plain, smooth = (
        sqnr_db(x @ weight.T, fake_quantize(x / s, 8, 1) @ fake_quantize(weight * s, 8, 1).T)
        for s in (torch.ones(64), scale)
    )
    assert smooth > plain + 6, (plain, smooth)


def test_errors() -> None:
    ones = torch.ones(4)
    with raises(ValueError, "weight_amax", "nan", 2):
        smoothing_scale(ones, torch.tensor([1.0, 1.0, torch.nan, 1.0]))
    with raises(ValueError, "activation_amax", -1.0, 0):
        smoothing_scale(-ones, ones)
    with raises(ValueError, "activation_amax", "weight_amax", (4,), (3,)):
        smoothing_scale(ones, ones[:3])
    with raises(ValueError, "alpha", 1.5):
        smoothing_scale(ones, ones, 1.5)
