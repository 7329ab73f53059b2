"""The effect of every step's velocity error on the final latents, measured one perturbed step at a time.

    step    0 … t-1        t                        t+1 … T-1
    takes   the stored     stored + perturbation    the model's own, from latents that have gone astray
            velocity
    costs   nothing        nothing                  one forward pass each

The velocity of step t gets a random error of `PERTURBATION` times its own length, in a random direction. The effect is the
relative squared change of the final latents over `PERTURBATION²`: with these as weights, the weighted sum of the relative
errors of all steps is the relative error of the final latents, as far as errors of several steps are small and independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reelquant.metrics import relative_error
from workers.messages import Generation, Progress
from workers.velocity_watch import changed_velocities, passes_left_out, run_latents

PERTURBATION = 0.2
"""Length of the perturbation over the velocity's. In bfloat16 two roll-outs part by about 0.005 of every later velocity
through rounding alone; smaller perturbations would measure that. One step moves the latents by a fiftieth of this."""
_TINY = 1e-30


def step_effects(
    pipeline: Any,
    prompt: str,
    generation: Generation,
    *,
    latents: Tensor,
    velocity: Tensor,
    steps: Sequence[int],
    rows: int = 1,
    seed: int,
    leave_out: bool = True,
    progress: Progress,
) -> dict[int, float]:
    """The effect of each of `steps` on the final latents of one trajectory of the full-precision model.

    Args:
        latents: `[T+1, C, F, H, W]` of the trajectory.
        velocity: `[T, C, F, H, W]` of the trajectory.
        steps: perturbed ones, rising.
        rows: roll-outs at once; with more than one, one of them is not perturbed, as a batch may round in another way.
        seed: of the perturbations.
        leave_out: leave out the forward passes whose velocity is stored; False runs them, for nothing.
    """
    at_once = max(1, rows - 1)
    chunks = [steps[i : i + at_once] for i in range(0, len(steps), at_once)]
    effects: dict[int, float] = {}
    for index, chunk in enumerate(chunks):

        def report(done: int, total: int, index: int = index) -> None:
            progress(index * total + done, len(chunks) * total)

        rollout = _RollOut(latents, velocity, chunk, with_reference=rows > 1, seed=seed)
        final = rollout.run(pipeline, prompt, generation, leave_out=leave_out, progress=report)
        reference = final[len(chunk)] if rows > 1 else latents[-1].to(final)
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

    def __init__(
        self, latents: Tensor, velocity: Tensor, steps: Sequence[int], *, with_reference: bool, seed: int
    ) -> None:
        self._latents, self._velocity, self._steps, self._seed = latents, velocity, steps, seed
        self._num_rows = len(steps) + with_reference
        self._at = 0
        """The step that comes next."""
        self._final = torch.empty(0)

    def run(self, pipeline: Any, prompt: str, generation: Generation, *, leave_out: bool, progress: Progress) -> Tensor:
        """The final latents `[rows, C, F, H, W]`."""
        with (
            changed_velocities(pipeline, self._change),
            passes_left_out(pipeline, lambda: leave_out and self._at <= self._steps[0]),
        ):
            run_latents(
                pipeline,
                [prompt] * self._num_rows,
                generation,
                latents=self._rows(self._latents[0]),
                after_step=self._after_step,
                progress=progress,
            )
        return self._final

    def _rows(self, stored: Tensor) -> Tensor:
        return stored.expand(self._num_rows, *stored.shape).clone()

    def _change(self, step: int, own: Tensor) -> Tensor:
        changed = self._rows(self._velocity[step]).to(own) if step <= self._steps[0] else own
        if step in self._steps:
            row = self._steps.index(step)
            generator = torch.Generator().manual_seed(self._seed + step)
            noise = torch.randn(changed[row].shape, generator=generator).to(changed[row].device)
            direction = noise / noise.norm()
            changed[row] += (PERTURBATION * changed[row].float().norm() * direction).to(changed)
        return changed

    def _after_step(self, step: int, own: Tensor) -> Tensor:
        self._at = step + 1
        self._final = own
        return self._rows(self._latents[step + 1]).to(own) if step < self._steps[0] else own
