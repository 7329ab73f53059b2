"""The velocity correction against lstsq, on known corrections, and on noise that must not be corrected."""

import pytest
import torch
from torch import Tensor

from reelquant.calibration.velocity_fit import RIDGES, VelocityMoments, _solve, fit_velocity
from tests.errors import raises

PROMPTS, STEPS, CHANNELS, POSITIONS = 5, 3, 4, (2, 7, 5)


def velocities(seed: int = 0, num: int = PROMPTS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 0.2, 3.0, 1.0]).view(-1, 1, 1, 1)
    return torch.randn(num, STEPS, CHANNELS, *POSITIONS, generator=generator) * scale + 0.3


def moments_of(reference: Tensor, quantized: Tensor) -> VelocityMoments:
    moments = VelocityMoments(*reference.shape[:3])
    for prompt in range(len(reference)):
        for step in range(STEPS):
            moments.add(prompt, step, reference=reference[prompt, step], quantized=quantized[prompt, step])
    return moments


@pytest.mark.parametrize("ridge", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("without", [None, 1])
def test_closed_form_is_that_of_lstsq(ridge: float, without: int | None) -> None:
    reference, quantized = velocities(0), velocities(1)
    gain, bias = _solve(moments_of(reference, quantized), ridge, without=without)
    kept = [prompt for prompt in range(PROMPTS) if prompt != without]
    for step in range(STEPS):
        for channel in range(CHANNELS):
            value = quantized[kept, step, channel].flatten().double()
            error = reference[kept, step, channel].flatten().double() - value
            columns = torch.stack([value, torch.ones_like(value)], dim=1)
            shrink = (ridge * columns.square().sum(dim=0)).sqrt().diag()
            rows, wanted = torch.cat([columns, shrink]), torch.cat([error, torch.zeros(2, dtype=torch.float64)])
            exact = torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0]
            assert float(gain[step, channel] - 1) == pytest.approx(float(exact[0]), rel=1e-9, abs=1e-12)
            assert float(bias[step, channel]) == pytest.approx(float(exact[1]), rel=1e-9, abs=1e-12)


def test_known_correction_is_found() -> None:
    generator = torch.Generator().manual_seed(2)
    gain = 1 + 0.2 * torch.randn(STEPS, CHANNELS, generator=generator)
    bias = 0.1 * torch.randn(STEPS, CHANNELS, generator=generator)
    quantized = velocities()
    reference = quantized * gain[..., None, None, None] + bias[..., None, None, None]
    fit = fit_velocity(moments_of(reference, quantized))
    assert fit.ridge == min(RIDGES), "nothing but the correction: the weakest shrinkage is best"
    assert torch.allclose(fit.gain.float() - 1, gain - 1, atol=0.02)
    assert torch.allclose(fit.bias.float(), bias, atol=0.02)
    assert fit.error_after < 1e-3 * fit.error_before


def test_error_is_that_of_the_prompt_left_out() -> None:
    quantized = velocities()
    reference = 1.1 * quantized + 0.3 * velocities(3)
    moments = moments_of(reference, quantized)
    fit = fit_velocity(moments)
    assert fit.ridge is not None
    error = 0.0
    for prompt in range(PROMPTS):
        gain, bias = (x[..., None, None, None] for x in _solve(moments, fit.ridge, without=prompt))
        error += float((quantized[prompt] * gain + bias - reference[prompt]).square().sum())
    assert fit.error_after == pytest.approx(error / float(reference.square().sum()), rel=1e-6)
    before = float((quantized - reference).square().sum() / reference.square().sum())
    assert fit.error_before == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_noise_is_not_corrected(seed: int) -> None:
    """Each prompt errs in its own direction: a correction from the others can only harm."""
    quantized = velocities(seed, 3)
    own = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1, 1, 1, 1) * 0.2
    fit = fit_velocity(moments_of(quantized * (1 + own) + own, quantized))
    assert fit.ridge is None
    assert fit.error_after == fit.error_before
    assert torch.equal(fit.gain, torch.ones(STEPS, CHANNELS, dtype=torch.float64))
    assert torch.equal(fit.bias, torch.zeros(STEPS, CHANNELS, dtype=torch.float64))


def test_exact_velocities_need_no_correction() -> None:
    fit = fit_velocity(moments_of(velocities(), velocities()))
    assert (fit.ridge, fit.error_before) == (None, 0.0)


def test_two_prompts_are_too_few() -> None:
    with raises(ValueError, "velocity correction", 3, 2):
        fit_velocity(moments_of(velocities(0, 2), velocities(1, 2)))


def test_a_step_can_be_added_in_parts() -> None:
    reference, quantized = velocities(0), velocities(1)
    whole, parts = moments_of(reference, quantized), VelocityMoments(PROMPTS, STEPS, CHANNELS)
    for prompt in range(PROMPTS):
        for step in range(STEPS):
            for part in (slice(0, 1), slice(1, None)):
                exact, value = (x[prompt, step, :, part] for x in (reference, quantized))
                parts.add(prompt, step, reference=exact, quantized=value)
    for name, values in whole.sums.items():
        assert torch.allclose(values, parts.sums[name], rtol=1e-12), name
