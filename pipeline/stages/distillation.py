"""Every method's blocks, segment by segment, and its linears outside the blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from pipeline.context import Run
from pipeline.run_units import part_name, part_names
from pipeline.stages.selection import selected_samples
from pipeline.stages.stage import StageUnit, UnitPlan, require_all, unit
from storage.cache import UnitRecord
from workers.distillation_worker import DistillationWorker
from workers.messages import DistillationSettings, MethodPlan, SegmentUnit


class Distillation:
    """By method and transformer one unit a segment, and one for what lies outside the blocks."""

    name, title = "distillation", "Distillation"
    worker_class = DistillationWorker

    def settings(self, run: Run) -> DistillationSettings:
        """Of every worker."""
        context = run.context
        return DistillationSettings(
            context.source,
            selected_samples(run),
            tuple(prompt.without_image for prompt in context.calibration_prompts),
            context.config.distillation.on_failure == "gptq",
            context.branches,
        )

    def plan(self, run: Run) -> list[UnitPlan]:
        """A segment depends on the activations only if its method reads them; workers get to know the selection at once."""
        return [
            UnitPlan(part_name(method.name, role, name), partial(self._unit, run, method, role, name, blocks))
            for method in run.context.methods
            for role in run.context.model.roles
            for name, blocks in parts(run)
        ]

    def _unit(self, run: Run, method: MethodPlan, role: str, name: str, blocks: tuple[str, ...]) -> StageUnit:
        context = run.context
        selected = [sample for sample in selected_samples(run) if sample.role == role]
        samples = [sample.name for sample in selected] if method.recipe.needs_activations and blocks else []
        prompts = [p.name for p in context.calibration_prompts] if blocks else []
        depends: dict[str, Any] = {
            **context.base_fingerprint(),
            "method": method.recipe.calibration_values(context.model.blocks),
            "bits": {name: bits.to_dict() for name, bits in method.bits.items() if _belongs(context, name, blocks)},
            "blocks": blocks,
            "on_failure": context.config.distillation.on_failure,
            "activations": [record.fingerprint for record in require_all(run, "activations", samples)],
            "trajectories": [record.fingerprint for record in require_all(run, "trajectories", prompts)],
        }
        full = part_name(method.name, role, name)
        return unit(self.name, full, SegmentUnit(full, method, blocks, role=role), depends)


def parts(run: Run) -> list[tuple[str, tuple[str, ...]]]:
    """Name and blocks of every unit of one transformer and method; the last one has no blocks."""
    segments = run.context.segments
    return list(zip(part_names(len(segments)), (*segments, ()), strict=True))


def distilled(run: Run, method: str, role: str) -> list[UnitRecord]:
    """Records of all parts of one transformer by one method.

    Raises:
        NotDone: with those that are missing.
    """
    return require_all(run, "distillation", [part_name(method, role, name) for name, _ in parts(run)])


def _belongs(context: Any, layer: str, blocks: tuple[str, ...]) -> bool:
    if blocks:
        return any(layer.startswith(f"{block}.") for block in blocks)
    return context.model.kinds[layer] in ("refiner", "embedder")
