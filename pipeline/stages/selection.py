"""Which (prompt, step) pairs the calibration uses, and why."""

from __future__ import annotations

from pipeline.context import Run
from pipeline.stages.stage import StageUnit, require, unit
from workers.messages import SampleUnit, SelectionSettings, SelectionUnit
from workers.selection_worker import SelectionWorker


class Selection:
    """One unit."""

    name, title = "selection", "Selection"
    worker_class = SelectionWorker

    def settings(self, run: Run) -> SelectionSettings:
        """Of the worker."""
        chosen = run.context.config.selection
        return SelectionSettings(run.context.source, chosen.strategy, chosen.quantization_feature, chosen.num_samples)

    def waves(self, run: Run) -> list[list[StageUnit]]:
        """One unit over all trajectories."""
        settings, prompts = self.settings(run), run.context.calibration_prompts
        depends = {
            "trajectories": [require(run, "trajectories", p.name).fingerprint for p in prompts],
            "seed": run.context.config.seed,
            "strategy": settings.strategy,
            "quantization_feature": settings.quantization_feature,
            "num_samples": settings.num_samples,
        }
        return [[unit(self.name, "selection", SelectionUnit("selection", prompts), depends)]]


def selected_samples(run: Run) -> tuple[SampleUnit, ...]:
    """The chosen candidates, in the order of the selection."""
    chosen = require(run, "selection", "selection").result["chosen"]
    return tuple(SampleUnit(f"{c['prompt']}-step-{c['step']:03d}", c["prompt"], c["step"]) for c in chosen)
