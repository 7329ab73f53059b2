from __future__ import annotations

import pytest
import torch

from reelquant.calibration import salience
from reelquant.calibration.salience import (
    diffusion_features,
    diffusion_salience,
    minmax,
    select_salient,
    weight_error,
)
from tests.errors import raises


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (6, 11)])
def test_diffusion_salience_is_the_formula(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = latents.clone()
    wide = latents.double()
    expected = [float((wide[t] - wide[t - 1]).square().sum() / wide[t].square().sum()) for t in range(1, 6)]
    got = diffusion_salience(latents)
    assert torch.equal(latents, given)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("feature", ["output", "denoised"])
def test_diffusion_features_are_those_of_euler_s_sampler(dtype: torch.dtype, feature: str) -> None:
    """A sampler with known velocities: step i's entry compares its velocity (or prediction) with that of step i - 1."""
    sigmas = [1.0, 0.9, 0.65, 0.3, 0.0]
    velocities = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latents = [torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]
    for step, velocity in enumerate(velocities):
        latents.append(latents[-1] + (sigmas[step + 1] - sigmas[step]) * velocity)
    denoised = [latents[step] - sigmas[step] * velocities[step] for step in range(4)]
    wanted = list(velocities) if feature == "output" else denoised
    changes = [float((wanted[i] - wanted[i - 1]).square().sum() / wanted[i].square().sum()) for i in (1, 2, 3)]
    found = diffusion_salience(diffusion_features(torch.stack(latents).to(dtype), sigmas, feature))
    torch.testing.assert_close(found, torch.tensor([0.0, *changes]))
    assert torch.equal(latents[-1], denoised[-1]) or feature == "output"


def test_diffusion_features_refuse_what_is_no_trajectory() -> None:
    latents = torch.rand(4, 5)
    assert diffusion_features(latents, (), "latent") is latents
    for sigmas, feature, words in (
        ([1.0, 0.5, 0.0], "output", ("sigmas", 3, 4)),
        ([1.0, 0.5, 0.5, 0.0], "denoised", ("sigmas", [1.0, 0.5, 0.5, 0.0])),
        ([1.0, 0.6, 0.3, 0.0], "noise", ("noise", "latent", "output", "denoised")),
    ):
        with raises(ValueError, *words):
            diffusion_features(latents, sigmas, feature)


def test_diffusion_salience_of_zero_and_broken_latents() -> None:
    assert diffusion_salience(torch.zeros(3, 4)).tolist() == [0.0, 0.0]
    latents = torch.ones(3, 4)
    latents[2] = 0
    with raises(ValueError, "latents[2]"):
        diffusion_salience(latents)
    latents[1, 1] = torch.inf
    with raises(ValueError, "latents", 1, 12):
        diffusion_salience(latents)
    with raises(ValueError, "latents", (1, 4)):
        diffusion_salience(torch.ones(1, 4))


def test_minmax() -> None:
    torch.testing.assert_close(minmax(torch.tensor([[2.0, 4.0], [3.0, 6.0]])), torch.tensor([[0, 0.5], [0.25, 1]]))
    assert minmax(torch.full((4,), -3.0)).tolist() == [1.0] * 4
    assert minmax(torch.tensor([-3e38, 0.0, 3e38])).tolist() == [0.0, 0.5, 1.0]
    with raises(ValueError, "x"):
        minmax(torch.empty(0))


def test_select_salient_takes_the_largest_products() -> None:
    c_diff, c_quant = torch.rand(101), torch.rand(101) * 1e6 + 5
    score = (c_diff - c_diff.min()) * (c_quant - c_quant.min())
    chosen = select_salient(c_diff, c_quant, 17)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == score.argsort(descending=True)[:17].tolist()


def test_select_salient_with_a_constant_side_and_ties() -> None:
    c_diff = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert select_salient(c_diff, torch.full((4,), 7.0), 3).tolist() == [1, 3, 2]
    assert select_salient(torch.ones(4), torch.ones(4), 4).tolist() == [0, 1, 2, 3]


def test_select_salient_errors() -> None:
    ones = torch.ones(4)
    for num in (0, 5):
        with raises(ValueError, num, 4):
            select_salient(ones, ones, num)
    with raises(ValueError, "c_quant", 1, 4):
        select_salient(ones, torch.tensor([1.0, torch.nan, 1.0, 1.0]), 2)
    with raises(ValueError, "c_diff", "c_quant", (4,), (3,)):
        select_salient(ones, ones[:3], 2)


def test_weight_error_is_the_relative_output_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salience, "CHUNK_ROWS", 10)
    x, weight = torch.randn(33, 12), torch.randn(7, 12)
    rounded = (weight * 4).round() / 4
    out, wrong = x.double() @ weight.double().T, x.double() @ rounded.double().T
    expected = float((out - wrong).square().sum() / out.square().sum())
    assert float(weight_error(x, weight, rounded)) == pytest.approx(expected, rel=1e-5)
    assert float(weight_error(x, weight, weight)) == 0.0


def test_weight_error_errors() -> None:
    x, weight = torch.randn(33, 12), torch.randn(7, 12)
    with raises(ValueError, "quantized_weight", 84, (7, 12)):
        weight_error(x, weight, weight * torch.nan)
    with raises(ValueError, "x @ weight^T"):
        weight_error(0 * x, weight, weight)
    with raises(ValueError, "x", "weight", (33, 12), (7, 11)):
        weight_error(x, weight[:, :11], weight)
