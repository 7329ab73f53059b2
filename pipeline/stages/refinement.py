"""What is fitted on a method's whole quantized model: repair of its drift and correction of its velocity (method §9)."""

from __future__ import annotations

from functools import partial
from typing import Any

from pipeline.context import Run
from pipeline.run_units import refined_methods, role_name
from pipeline.stages.assembly import block_artifacts, sparse_attention
from pipeline.stages.distillation import distilled
from pipeline.stages.selection import selected_samples
from pipeline.stages.stage import StageUnit, UnitPlan, require_all, unit
from workers.messages import MethodPlan, RefinementSettings, RefinementUnit
from workers.refinement_worker import MEASURED_PROMPTS, RefinementWorker


class Refinement:
    """One unit a transformer and method that asks for it; none if no method does."""

    name, title = "refinement", "Refinement"
    worker_class = RefinementWorker

    def settings(self, run: Run) -> RefinementSettings:
        """Of every worker."""
        context = run.context
        prompts = tuple(prompt.without_image for prompt in context.calibration_prompts)
        return RefinementSettings(context.source, context.config.generation, selected_samples(run), prompts)

    def plan(self, run: Run) -> list[UnitPlan]:
        """Each depends on its transformer's blocks, and on the calibration data that it reads."""
        methods = {method.name: method for method in run.context.methods}
        return [
            UnitPlan(role_name(name, role), partial(self._unit, run, methods[name], role))
            for name in refined_methods(run.context.config)
            for role in run.context.model.roles
        ]

    def _unit(self, run: Run, method: MethodPlan, role: str) -> StageUnit:
        settings, name = self.settings(run), role_name(method.name, role)
        samples = [sample for sample in settings.samples if sample.role == role]
        records = distilled(run, method.name, role)
        artifacts = block_artifacts(records)
        sparse = sparse_attention(method, records)
        depends: dict[str, Any] = {
            **run.context.base_fingerprint(),
            "blocks": [record.fingerprint for record in records],
            "inference": method.generation_values(),
            "drift": [record.fingerprint for record in require_all(run, "activations", [s.name for s in samples])]
            if method.recipe.drift_repair
            else None,
            "velocity": [
                record.fingerprint for record in require_all(run, "trajectories", [p.name for p in settings.prompts])
            ]
            if method.recipe.velocity_correction
            else None,
        }
        if method.recipe.drift_repair:  # read with the activations, whose fingerprints cover them
            require_all(run, "trajectories", dict.fromkeys(sample.prompt_name for sample in samples))
        if method.recipe.attention.measures_residual:
            prompts = settings.prompts[:MEASURED_PROMPTS]
            depends["residual"] = {
                "gain": method.recipe.attention.calibrates_gain,
                "placed": method.recipe.attention.places_refreshes,
                "density": None if sparse is None else sparse.density,
                "trajectories": [r.fingerprint for r in require_all(run, "trajectories", [p.name for p in prompts])],
            }
        steps = run.context.steps[role] if run.context.served else None
        if steps is not None:
            depends["steps"] = steps
        payload = RefinementUnit(name, method, artifacts, sparse, role, steps)
        return unit(self.name, name, payload, depends)
