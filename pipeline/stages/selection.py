"""Which (prompt, step) pairs the calibration uses, and why."""

from __future__ import annotations

from pipeline.context import Run
from pipeline.run_units import SELECTION, sample_name
from pipeline.stages.stage import StageUnit, UnitPlan, require, require_all, unit
from workers.messages import SampleUnit, SelectionSettings, SelectionUnit
from workers.selection_worker import SelectionWorker


class Selection:
    """One unit."""

    name, title = "selection", "Selection"
    worker_class = SelectionWorker

    def settings(self, run: Run) -> SelectionSettings:
        """Of the worker."""
        chosen = run.context.config.selection
        sigmas: tuple[float, ...] = ()
        if chosen.used_diffusion_feature != "latent":
            sigmas = tuple(run.context.model.sigmas(run.context.config.generation.num_inference_steps))
        return SelectionSettings(
            run.context.source,
            chosen.strategy,
            chosen.used_feature,
            chosen.num_samples,
            chosen.features,
            chosen.used_diffusion_feature,
            sigmas,
            tuple(run.context.steps.values()) if run.context.served else (),
        )

    def plan(self, run: Run) -> list[UnitPlan]:
        """One unit over all trajectories."""
        return [UnitPlan(SELECTION, lambda: self._unit(run))]

    def _unit(self, run: Run) -> StageUnit:
        settings, prompts = self.settings(run), run.context.calibration_prompts
        depends = {
            "trajectories": [r.fingerprint for r in require_all(run, "trajectories", [p.name for p in prompts])],
            "seed": run.context.config.seed,
            "strategy": settings.strategy,
            "quantization_feature": settings.quantization_feature,
            "num_samples": settings.num_samples,
        }
        if settings.diffusion_feature != "latent":
            depends |= {"diffusion_feature": settings.diffusion_feature, "sigmas": settings.sigmas}
        if settings.pools:
            depends["pools"] = settings.pools
        return unit(
            self.name,
            SELECTION,
            SelectionUnit(SELECTION, tuple(p.without_image for p in prompts)),
            depends,
            shared=True,
        )


def selected_samples(run: Run) -> tuple[SampleUnit, ...]:
    """The chosen candidates, in the order of the selection.

    Raises:
        NotDone: before the selection.
    """
    served = {step: role for role, steps in run.context.steps.items() for step in steps}
    return tuple(
        SampleUnit(sample_name(c["prompt"], c["step"]), c["prompt"], c["step"], served[c["step"]])
        for c in require(run, "selection", SELECTION).result["chosen"]
    )
