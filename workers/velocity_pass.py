"""Teacher-forced passes of the evaluation: the stored trajectory of the full-precision model, and every step's error on it.

Arrays of one prompt, under `evaluation/<unit of the full-precision model>/`, float32: `latents [T+1, C, F, H, W]`, `velocity
[T, C, F, H, W]`, and where a step takes P > 1 passes (classifier-free guidance) `passes [T, P, C, F, H, W]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reelquant.metrics import relative_error
from reelquant.settings.generation import Generation
from storage.recorded_outputs import RecordedOutputs
from storage.unit_store import UnitStore
from workers.denoised import denoised_changes, denoised_coefficients
from workers.messages import Progress, PromptUnit
from workers.velocity_watch import teacher_forced, watched_velocities


@dataclass
class Velocities:
    """The velocities of one generation, on the CPU in float32."""

    guided: list[Tensor] = field(default_factory=list)
    """`[C, F, H, W]` of every step."""
    passes: list[Tensor] = field(default_factory=list)
    """`[P, C, F, H, W]` of every step."""

    @contextmanager
    def kept(self, pipeline: Any) -> Iterator[None]:
        """While open, the steps of a generation of one video are kept."""

        def keep(_step: int, velocity: Tensor, passes: Sequence[Tensor]) -> None:
            self.guided.append(velocity[0].float().cpu())
            self.passes.append(torch.stack([output[0].float().cpu() for output in passes]))

        with watched_velocities(pipeline, keep):
            yield

    def write(self, store: UnitStore, name: str) -> None:
        """Writes `<name>/velocity` and, for more than one pass a step, `<name>/passes`."""
        store.write(f"{name}/velocity", torch.stack(self.guided))
        if len(self.passes[0]) > 1:
            store.write(f"{name}/passes", torch.stack(self.passes))

    def denoised_changes(self, pipeline: Any, latents: Sequence[Tensor]) -> list[float] | None:
        """Relative change of the denoised prediction from step to step, `T - 1` numbers; None where the scheduler does not say
        how it follows from the velocity. The scheduler must be as the generation has left it."""
        try:
            coefficients = denoised_coefficients(pipeline.scheduler)
        except ValueError:
            return None
        return denoised_changes(latents, self.guided, coefficients)


def velocity_errors(
    pipeline: Any,
    prompts: Sequence[PromptUnit],
    generation: Generation,
    *,
    store: RecordedOutputs,
    names: Sequence[str],
    seeds: Sequence[int],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Relative squared errors of the velocities of `pipeline` on stored trajectories, all prompts in one call.

    Args:
        store: of the full-precision trajectories.
        names: of each prompt's arrays in it.
        seeds: of each prompt's generation.

    Returns:
        by name of the prompt `velocity_error`, T numbers, and for several passes a step `pass_errors`, T times P numbers.
    """
    latents = torch.stack([store.read(f"{name}/latents") for name in names], dim=1)
    guided = [store.read(f"{name}/velocity") for name in names]
    several: list[Tensor] = []
    errors: dict[str, dict[str, Any]] = {prompt.name: {"velocity_error": []} for prompt in prompts}

    def measure(step: int, velocity: Tensor, passes: Sequence[Tensor]) -> None:
        if len(passes) > 1 and not several:
            several.extend(store.read(f"{name}/passes") for name in names)
        for row, found in enumerate(errors.values()):
            found["velocity_error"].append(_error(guided[row][step], velocity[row]))
            if several:
                pairs = zip(several[row][step], passes, strict=True)
                found.setdefault("pass_errors", []).append([_error(known, output[row]) for known, output in pairs])

    teacher_forced(
        pipeline,
        prompts,
        generation,
        latents=latents,
        seeds=seeds,
        watch=measure,
        progress=progress,
    )
    return errors


def latent_errors(store: RecordedOutputs, name: str, latents: Sequence[Tensor]) -> list[float]:
    """Relative squared error of the latents after every step of a generation to those of the stored one of the same noise.

    Args:
        name: of the stored trajectory.
        latents: T+1 tensors `[C, F, H, W]`.
    """
    rows = (store.read(f"{name}/latents", rows=slice(step, step + 1))[0] for step in range(1, len(latents)))
    return [relative_error(reference, own) for reference, own in zip(rows, latents[1:], strict=True)]


def _error(reference: Tensor, velocity: Tensor) -> float:
    return relative_error(reference.to(velocity.device), velocity.float())
