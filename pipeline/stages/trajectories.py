"""Full-precision trajectories of the calibration prompts, with the salience of every candidate."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from pipeline.context import Run
from pipeline.stages.stage import StageUnit, UnitPlan, unit
from workers.messages import PromptUnit, TrajectorySettings
from workers.trajectory_worker import TrajectoryWorker


class Trajectories:
    """One unit a prompt."""

    name, title = "trajectories", "Trajectories"
    worker_class = TrajectoryWorker

    def settings(self, run: Run) -> TrajectorySettings:
        """Of every worker."""
        context, selection = run.context, run.context.config.selection
        return TrajectorySettings(
            context.source,
            context.config.generation,
            selection.weight_error_bits or context.config.bits.weight,
            selection.weight_error_tokens,
            context.sharding,
            selection.features,
            context.served,
        )

    def plan(self, run: Run) -> list[UnitPlan]:
        """They depend on nothing."""
        settings = self.settings(run)
        depends = {
            **run.context.base_fingerprint(),
            "generation": asdict(settings.generation),
            "features": settings.features,
        }
        if "weight_error" in settings.features:
            depends |= {"weight_bits": settings.weight_bits, "salience_tokens": settings.salience_tokens}

        def make(prompt: PromptUnit) -> StageUnit:
            return unit(self.name, prompt.name, prompt, {**depends, **prompt.to_dict()}, shared=True)

        return [UnitPlan(prompt.name, partial(make, prompt)) for prompt in run.context.calibration_prompts]
