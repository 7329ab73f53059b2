"""Full-precision trajectories of the calibration prompts, with the salience of every candidate."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.context import Run
from pipeline.stages.stage import StageUnit, unit
from workers.messages import TrajectorySettings
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
            context.generation,
            selection.weight_error_bits or context.config.bits.weight,
            selection.weight_error_tokens,
            context.sharding,
        )

    def waves(self, run: Run) -> list[list[StageUnit]]:
        """All prompts at once."""
        settings = self.settings(run)
        depends = {
            **run.context.base_fingerprint(),
            "generation": asdict(settings.generation),
            "weight_bits": settings.weight_bits,
            "salience_tokens": settings.salience_tokens,
        }
        prompts = run.context.calibration_prompts
        return [[unit(self.name, p.name, p, {**depends, "prompt": p.prompt}, shared=True) for p in prompts]]
