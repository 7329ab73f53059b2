"""The checkpoints: the run's method in `checkpoint/`, those it is compared with in `checkpoints/<method>/`."""

from __future__ import annotations

from pipeline.context import Run
from pipeline.stages.distillation import parts
from pipeline.stages.stage import StageUnit, require, unit
from workers.assembly_worker import AssemblyWorker
from workers.messages import AssemblySettings, AssemblyUnit, MethodPlan


class Assembly:
    """One unit a method."""

    name, title = "assembly", "Assembly"
    worker_class = AssemblyWorker

    def settings(self, run: Run) -> AssemblySettings:
        """Of every worker."""
        config = run.context.config
        selection, model = config.selection, run.context.model
        provenance = {
            "model": model.folder.name,
            "model_fingerprint": run.context.model_fingerprint,
            "seed": config.seed,
            "selection": selection.strategy,
            "num_samples": selection.num_samples,
            "num_prompts": config.prompts.num_calibration,
            "generation": config.generation.model_dump(mode="json"),
        }
        return AssemblySettings(run.context.source, config.assembly.max_shard_bytes, provenance)

    def waves(self, run: Run) -> list[list[StageUnit]]:
        """All methods at once."""
        return [[self._unit(run, method) for method in run.context.methods]]

    def _unit(self, run: Run, method: MethodPlan) -> StageUnit:
        records = [require(run, "distillation", f"{method.name}-{name}") for name, _ in parts(run)]
        label = run.context.config.bits.label
        artifacts = tuple(output.path for record in records for output in record.outputs)
        payload = AssemblyUnit(method.name, method, label, artifacts, checkpoint_path(run, method.name))
        depends = {
            "model": run.context.model_fingerprint,
            "blocks": [record.fingerprint for record in records],
            "bits": label,
            "max_shard_bytes": run.context.config.assembly.max_shard_bytes,
            "checkpoint": payload.checkpoint,
            "calibration": dict(self.settings(run).calibration),
        }
        return unit(self.name, method.name, payload, depends)


def checkpoint_path(run: Run, method: str) -> str:
    """Where a method's checkpoint is, relative to the run directory."""
    directory = run.directory
    path = directory.checkpoint(None if method == run.context.methods[0].name else method)
    return path.relative_to(directory.path).as_posix()
