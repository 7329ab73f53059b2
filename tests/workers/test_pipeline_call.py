"""Settings that a pipeline's call does not take, guiders, and schedulers whose steps are called in other ways."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.errors import names
from workers.pipeline_call import guider_problem, set_elsewhere
from workers.velocity_watch import changed_latents, changed_velocities


def test_settings_that_are_no_arguments_are_known_by_the_pipelines_class() -> None:
    assert set(set_elsewhere(diffusers.HunyuanVideo15Pipeline)) == {"guidance_scale", "max_sequence_length"}
    assert not set_elsewhere(diffusers.HunyuanVideoPipeline)
    assert not set_elsewhere(diffusers.CogVideoXPipeline)


def test_a_guider_calls_twice_or_never() -> None:
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=6.0)
    assert guider_problem(guider) is None
    assert guider.guidance_scale == 6.0


@pytest.mark.parametrize(
    "changes", [{"start": 0.2}, {"stop": 0.9}, {"enabled": False}, {"use_original_formulation": True}], ids=str
)
def test_other_guiders_are_refused(changes: dict[str, Any]) -> None:
    problem = guider_problem(diffusers.ClassifierFreeGuidance(**changes))
    assert problem is not None
    assert names(problem, "guidance_scale", "start", "stop", "enabled", "use_original_formulation")


@pytest.mark.parametrize("scheduler", [diffusers.CogVideoXDDIMScheduler(), diffusers.CogVideoXDPMScheduler()])
def test_steps_are_changed_however_they_are_called(scheduler: Any) -> None:
    """As `CogVideoXPipeline` calls them: one of them takes its last prediction in second place."""
    scheduler.set_timesteps(4)
    pipeline, latents = SimpleNamespace(scheduler=scheduler), torch.randn(1, 2, 3, 4, 4)
    seen: list[tuple[int, Tensor]] = []
    more = () if isinstance(scheduler, diffusers.CogVideoXDDIMScheduler) else (None,)

    def velocity(step: int, given: Tensor, sample: Tensor) -> Tensor:
        assert torch.equal(sample, latents)
        seen.append((step, given))
        return given * 2

    def stepped(output: Tensor) -> Tensor:
        place = (*more, scheduler.timesteps[0], *more)
        found: Tensor = scheduler.step(
            output, *place, latents, generator=torch.Generator().manual_seed(0), return_dict=False
        )[0]
        return found

    output = torch.randn_like(latents)
    doubled = stepped(output * 2)
    with changed_velocities(pipeline, velocity), changed_latents(pipeline, lambda step, own: own + 1 + step):
        changed = stepped(output)
    assert torch.equal(changed, doubled + 1)
    assert [step for step, _ in seen] == [0]
    assert torch.equal(seen[0][1], output)
