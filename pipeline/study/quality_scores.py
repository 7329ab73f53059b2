"""Numbers in dB from the errors that the evaluation has recorded, by model and held-out prompt; for report and studies alike.

| key | is |
|---|---|
| `velocity_sqnr_db` | SQNR of the teacher-forced velocity, every step weighed by its measured effect on the final latents |
| `velocity_sqnr_db_early`, `_middle`, `_late` | the same in each third of the schedule, its steps weighed alike |
| `pass_sqnr_db_0`, `_1`, ... | of each pass of classifier-free guidance, weighed as the first |
| `early_commit_db` | SQNR of the latents at the end of the decision phase, closed loop |

Where all is exact they are `EXACT_DB`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.run_units import (
    FULL_PRECISION,
    STEP_WEIGHTS,
    evaluated_models,
    evaluation_name,
    prompt_names,
    velocity_groups,
    velocity_name,
)
from reelquant.calibration.block_rounding import EXACT_DB
from reelquant.metrics import trajectory_sqnr_db

THIRDS = ("early", "middle", "late")
"""Of the schedule, in equal numbers of steps as far as they divide."""
SETTLED = 0.05
"""Relative change of the denoised prediction from one step to the next, below which nothing is decided any more."""


@dataclass(frozen=True)
class Recorded:
    """What the evaluation of one run has recorded beside its videos, as far as it has come."""

    step_weights: tuple[float, ...] | None
    decision_steps: int | None
    """Steps of the decision phase; None where neither configuration nor records tell."""
    velocity_errors: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """By model and prompt, as the worker has returned them."""
    latent_errors: Mapping[str, Mapping[str, Sequence[float]]]
    """By model and prompt: relative squared error after every step, closed loop."""

    def scores(self, model: str) -> dict[str, dict[str, float]]:
        """By prompt, of one model."""
        found: dict[str, dict[str, float]] = {}
        for prompt, measured in self.velocity_errors.get(model, {}).items():
            found.setdefault(prompt, {}).update(self._velocity(measured))
        for prompt, errors in self.latent_errors.get(model, {}).items():
            if self.decision_steps is not None:
                early = _capped([errors[self.decision_steps - 1]], None)
                found.setdefault(prompt, {})["early_commit_db"] = early
        return found

    def _velocity(self, measured: Mapping[str, Any]) -> dict[str, float]:
        errors = measured["velocity_error"]
        scores = {} if self.step_weights is None else {"velocity_sqnr_db": _capped(errors, self.step_weights)}
        bounds = [round(part * len(errors) / len(THIRDS)) for part in range(len(THIRDS) + 1)]
        for name, first, end in zip(THIRDS, bounds, bounds[1:], strict=False):
            if end > first:
                scores[f"velocity_sqnr_db_{name}"] = _capped(errors[first:end], None)
        if self.step_weights is not None:
            for index, own in enumerate(zip(*measured.get("pass_errors", ()), strict=True)):
                scores[f"pass_sqnr_db_{index}"] = _capped(own, self.step_weights)
        return scores


def recorded(config: RunConfig, result_of: Callable[[str], Mapping[str, Any] | None]) -> Recorded:
    """Reads what is there.

    Args:
        result_of: the result of a unit of the evaluation by its name; None where it is not done.
    """
    weights = result_of(STEP_WEIGHTS)
    prompts, models = prompt_names(config.prompts.num_held_out), evaluated_models(config)
    full = [result_of(evaluation_name(FULL_PRECISION, prompt)) or {} for prompt in prompts]
    velocity: dict[str, dict[str, Mapping[str, Any]]] = {}
    latents: dict[str, dict[str, Sequence[float]]] = {}
    for model in models:
        for index in range(len(velocity_groups(config))):
            velocity.setdefault(model, {}).update((result_of(velocity_name(model, index)) or {}).get("prompts", {}))
        for prompt in prompts:
            own = result_of(evaluation_name(model, prompt)) or {}
            if own.get("latent_error"):
                latents.setdefault(model, {})[prompt] = own["latent_error"]
    decision = config.evaluation.decision_steps or decision_steps(
        [result["denoised_changes"] for result in full if result.get("denoised_changes")]
    )
    return Recorded(None if weights is None else tuple(weights["weights"]), decision, velocity, latents)


def decision_steps(changes: Sequence[Sequence[float]]) -> int | None:
    """Steps up to the last in which the denoised prediction moves by `SETTLED` or more in the mean over prompts; 1 at least.

    Args:
        changes: of each prompt, from step t - 1 to step t for t = 1 .. T-1.

    Returns:
        None for no prompt.
    """
    if not changes:
        return None
    means = [statistics.fmean(values) for values in zip(*changes, strict=True)]
    return 1 + max((step for step, change in enumerate(means, start=1) if change >= SETTLED), default=0)


def _capped(errors: Sequence[float], weights: Sequence[float] | None) -> float:
    return min(EXACT_DB, trajectory_sqnr_db(errors, weights))
