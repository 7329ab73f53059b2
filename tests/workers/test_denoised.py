"""The denoised prediction by the constants of diffusers' own schedulers: where the noise is known, it must come out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tests.errors import raises
from workers.denoised import denoised_changes, denoised_coefficients

SCHEDULERS: dict[str, Any] = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "inverted flow": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "UniPC flow": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    "CogVideoX": CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    "epsilon": DDIMScheduler(prediction_type="epsilon"),
    "sample": DDIMScheduler(prediction_type="sample"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_exact_velocity_gives_the_clean_latents_at_every_step(name: str) -> None:
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(7)
    clean, noise = torch.randn(2, 5), torch.randn(2, 5)
    coefficients = denoised_coefficients(scheduler)
    assert len(coefficients) == len(scheduler.timesteps) == 7
    for step, (a, b) in enumerate(coefficients):
        if "flow" in name:
            sigma = scheduler.sigmas[step]
            sigma = 1 - sigma if name == "inverted flow" else sigma
            latents, velocity = (1 - sigma) * clean + sigma * noise, noise - clean
            velocity = -velocity if name == "inverted flow" else velocity
        else:
            signal = scheduler.alphas_cumprod[int(scheduler.timesteps[step])].double()
            latents = signal.sqrt() * clean + (1 - signal).sqrt() * noise
            v = signal.sqrt() * noise - (1 - signal).sqrt() * clean
            velocity = {"CogVideoX": v, "epsilon": noise, "sample": clean}[name]
        if a * b != 0 and abs(b) > 1e3:
            continue  # all noise: nothing clean is left
        torch.testing.assert_close((a * latents + b * velocity).float(), clean, rtol=1e-3, atol=1e-3)


def test_changes_are_relative_to_the_prediction_before() -> None:
    latents = [torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), torch.tensor([2.0, 2.0])]
    velocities = [torch.tensor([1.0, 0.0])] * 3
    changes = denoised_changes(latents, velocities, [(2.0, 0.0), (1.0, 0.0), (1.0, -1.0)])
    assert changes == pytest.approx([0.0, (1 + 4) ** 0.5 / 2])


def test_a_scheduler_that_does_not_say_is_named() -> None:
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="score")
    scheduler.set_timesteps(3)
    with raises(ValueError, "DDIMScheduler", "score"):
        denoised_coefficients(scheduler)
