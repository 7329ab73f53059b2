"""What is fitted on a method's whole quantized model: repair of its drift and correction of its velocity (method §9)."""

from __future__ import annotations

from functools import partial
from typing import Any

from pipeline.context import Run
from pipeline.run_units import part_name, refined_methods
from pipeline.stages.assembly import block_artifacts, sparse_attention
from pipeline.stages.distillation import parts
from pipeline.stages.selection import selected_samples
from pipeline.stages.stage import StageUnit, UnitPlan, require_all, unit
from workers.messages import MethodPlan, RefinementSettings, RefinementUnit
from workers.refinement_worker import MEASURED_PROMPTS, RefinementWorker


class Refinement:
    """One unit a method that asks for it; none if no method does."""

    name, title = "refinement", "Refinement"
    worker_class = RefinementWorker

    def settings(self, run: Run) -> RefinementSettings:
        """Of every worker."""
        context = run.context
        return RefinementSettings(
            context.source, context.config.generation, selected_samples(run), context.calibration_prompts
        )

    def plan(self, run: Run) -> list[UnitPlan]:
        """Each depends on its method's blocks, and on the calibration data that it reads."""
        methods = {method.name: method for method in run.context.methods}
        return [UnitPlan(name, partial(self._unit, run, methods[name])) for name in refined_methods(run.context.config)]

    def _unit(self, run: Run, method: MethodPlan) -> StageUnit:
        settings = self.settings(run)
        records = require_all(run, "distillation", [part_name(method.name, name) for name, _ in parts(run)])
        artifacts = block_artifacts(records)
        sparse = sparse_attention(method, records)
        depends: dict[str, Any] = {
            **run.context.base_fingerprint(),
            "blocks": [record.fingerprint for record in records],
            "inference": method.generation_values(),
            "drift": [
                record.fingerprint for record in require_all(run, "activations", [s.name for s in settings.samples])
            ]
            if method.recipe.drift_repair
            else None,
            "velocity": [
                record.fingerprint for record in require_all(run, "trajectories", [p.name for p in settings.prompts])
            ]
            if method.recipe.velocity_correction
            else None,
        }
        if method.recipe.drift_repair:  # read with the activations, whose fingerprints cover them
            require_all(run, "trajectories", dict.fromkeys(sample.prompt_name for sample in settings.samples))
        if method.recipe.attention.measures_residual:
            prompts = settings.prompts[:MEASURED_PROMPTS]
            depends["residual"] = {
                "gain": method.recipe.attention.calibrates_gain,
                "placed": method.recipe.attention.places_refreshes,
                "density": None if sparse is None else sparse.density,
                "trajectories": [r.fingerprint for r in require_all(run, "trajectories", [p.name for p in prompts])],
            }
        return unit(self.name, method.name, RefinementUnit(method.name, method, artifacts, sparse), depends)
