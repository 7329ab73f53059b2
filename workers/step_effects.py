"""The effect of every step's velocity error on the final latents, measured one perturbed step at a time.

    step    0 … t-1        t                        t+1 … T-1
    takes   the stored     stored + perturbation    the model's own, from latents that have gone astray
            velocity
    costs   nothing        nothing                  one forward pass each

The perturbation of step t has the direction of a quantizer's error, that of weights rounded to nearest (`rounded_blocks`), and
`PERTURBATION` times the length of the velocity. A random direction would not do: the model takes it for noise and removes it,
so that its effect is 100 to 300 times smaller (small model) and the last step, behind which nothing follows, is all that
counts. The effect is the relative squared change of the final latents over `PERTURBATION²`: with these as weights, the
weighted sum of the relative errors of all steps is the relative error of the final latents, as far as errors of several
steps are small and independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reelquant.families.family import Family
from reelquant.metrics import relative_error
from reelquant.settings.generation import Generation
from workers.messages import Progress, PromptUnit
from workers.rounded_outputs import rounded_blocks
from workers.velocity_watch import changed_velocities, passes_left_out, run_latents, teacher_forced, transformers

PERTURBATION = 0.2
"""Length of the perturbation over the velocity's. In bfloat16 two roll-outs part through rounding alone: with 0.05 that is
measured instead for most steps, with 0.2 effects are those in float32 to a fifth (small model, 30 steps)."""
_TINY = 1e-30


@dataclass(frozen=True)
class Trajectory:
    """A stored trajectory of the full-precision model."""

    prompt: PromptUnit
    latents: Tensor
    """`[T+1, C, F, H, W]`"""
    velocity: Tensor
    """`[T, C, F, H, W]`"""
    seed: int
    """With which it was generated."""


def rounding_errors(
    pipeline: Any,
    family: Family,
    trajectory: Trajectory,
    generation: Generation,
    *,
    steps: Sequence[int],
    leave_out: bool = True,
    progress: Progress,
) -> dict[int, Tensor]:
    """What rounding the weights changes of the velocity `[C, F, H, W]`, at each of `steps` of a trajectory.

    Args:
        leave_out: leave out the forward passes of all other steps.
    """
    errors: dict[int, Tensor] = {}
    at = 0

    def watch(step: int, velocity: Tensor, _passes: Sequence[Tensor]) -> None:
        nonlocal at
        if step in steps:
            errors[step] = velocity[0].float().cpu() - trajectory.velocity[step]
        at = step + 1

    with ExitStack() as stack:
        for transformer in transformers(pipeline):
            stack.enter_context(rounded_blocks(family, transformer))
        stack.enter_context(passes_left_out(pipeline, family, lambda: leave_out and at not in steps))
        teacher_forced(
            pipeline,
            [trajectory.prompt],
            generation,
            latents=trajectory.latents.unsqueeze(1),
            seeds=[trajectory.seed],
            watch=watch,
            progress=progress,
        )
    return errors


def step_effects(
    pipeline: Any,
    family: Family,
    trajectory: Trajectory,
    generation: Generation,
    *,
    errors: Mapping[int, Tensor],
    rows: int = 1,
    leave_out: bool = True,
    progress: Progress,
) -> dict[int, float]:
    """The effect of an error of each step on the final latents of a trajectory of the full-precision model.

    Args:
        errors: by step, those to be perturbed; only their directions count.
        rows: roll-outs at once; with more than one, one of them is not perturbed, as a batch may round in another way.
        leave_out: leave out the forward passes whose velocity is stored; False runs them, for nothing.
    """
    at_once, steps = max(1, rows - 1), sorted(errors)
    chunks = [steps[i : i + at_once] for i in range(0, len(steps), at_once)]
    effects: dict[int, float] = {}
    for index, chunk in enumerate(chunks):

        def report(done: int, total: int, index: int = index) -> None:
            progress(index * total + done, len(chunks) * total)

        rollout = _RollOut(trajectory, {step: errors[step] for step in chunk}, with_reference=rows > 1)
        final = rollout.run(pipeline, family, generation, leave_out=leave_out, progress=report)
        reference = final[len(chunk)] if rows > 1 else trajectory.latents[-1].to(final)
        for row, step in enumerate(chunk):
            effects[step] = relative_error(reference, final[row]) / PERTURBATION**2
    return effects


def spread_steps(num: int, num_steps: int) -> tuple[int, ...]:
    """`num` steps of a schedule of `num_steps`, evenly spaced, the first and the last among them."""
    return tuple(dict.fromkeys(round(place) for place in np.linspace(0, num_steps - 1, num)))


def interpolated(effects: Mapping[int, float], num_steps: int) -> list[float]:
    """An effect for every step: between measured ones, logarithms lie on a line."""
    known = sorted(effects)
    logarithms = [math.log(max(effects[step], _TINY)) for step in known]
    return [float(value) for value in np.exp(np.interp(range(num_steps), known, logarithms))]


class _RollOut:
    """One call of the pipeline: a row for each perturbed step, and one without any if asked for."""

    def __init__(self, trajectory: Trajectory, errors: Mapping[int, Tensor], *, with_reference: bool) -> None:
        self._trajectory, self._errors, self._steps = trajectory, errors, list(errors)
        self._num_rows = len(errors) + with_reference
        self._at = 0
        """The step that comes next."""
        self._final = torch.empty(0)

    def run(
        self, pipeline: Any, family: Family, generation: Generation, *, leave_out: bool, progress: Progress
    ) -> Tensor:
        """The final latents `[rows, C, F, H, W]`."""
        with (
            changed_velocities(pipeline, self._change),
            passes_left_out(pipeline, family, lambda: leave_out and self._at <= self._steps[0]),
        ):
            run_latents(
                pipeline,
                [self._trajectory.prompt] * self._num_rows,
                generation,
                latents=self._rows(self._trajectory.latents[0]),
                seeds=[self._trajectory.seed] * self._num_rows,
                after_step=self._after_step,
                progress=progress,
            )
        return self._final

    def _rows(self, stored: Tensor) -> Tensor:
        return stored.expand(self._num_rows, *stored.shape).clone()

    def _change(self, step: int, own: Tensor, _sample: Tensor) -> Tensor:
        changed = self._rows(self._trajectory.velocity[step]).to(own) if step <= self._steps[0] else own
        if step in self._errors:
            row, error = self._steps.index(step), self._errors[step]
            length = PERTURBATION * self._trajectory.velocity[step].norm()
            changed[row] += (error * (length / error.norm().clamp(min=_TINY))).to(changed)
        return changed

    def _after_step(self, step: int, own: Tensor) -> Tensor:
        self._at = step + 1
        self._final = own
        return self._rows(self._trajectory.latents[step + 1]).to(own) if step < self._steps[0] else own
