"""The checkpoints: the run's method in `checkpoint/`, those it is compared with in `checkpoints/<method>/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath

from pipeline.context import Run
from pipeline.run_units import role_name
from pipeline.stages.distillation import distilled
from pipeline.stages.stage import StageUnit, UnitPlan, require_all, unit
from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.calibration.residual_drift import MeasuredResidual
from reelquant.checkpoint.inference_specs import VelocityCorrection
from storage.cache import UnitRecord
from workers.assembly_worker import AssemblyWorker
from workers.messages import AssembledTransformer, AssemblySettings, AssemblyUnit, MethodPlan


class Assembly:
    """One unit a method."""

    name, title = "assembly", "Assembly"
    worker_class = AssemblyWorker

    def settings(self, run: Run) -> AssemblySettings:
        """Of every worker."""
        config = run.context.config
        selection, model = config.selection, run.context.model
        provenance = {
            "model": model.found.name,
            **({} if config.model_commit is None else {"model_commit": config.model_commit}),
            "model_fingerprint": run.context.model_fingerprint,
            "seed": config.seed,
            "selection": selection.strategy,
            "num_samples": selection.num_samples,
            "num_prompts": config.prompts.num_calibration,
            "generation": config.generation.to_dict(),
        }
        return AssemblySettings(run.context.source, config.assembly.max_shard_bytes, provenance)

    def plan(self, run: Run) -> list[UnitPlan]:
        """Each depends on its method's blocks, and on its refinement if it has one."""
        return [UnitPlan(method.name, partial(self._unit, run, method)) for method in run.context.methods]

    def _unit(self, run: Run, method: MethodPlan) -> StageUnit:
        blocks = {role: distilled(run, method.name, role) for role in run.context.model.roles}
        refined: dict[str, UnitRecord] = {}
        if method.recipe.is_refined:
            names = [role_name(method.name, role) for role in blocks]
            refined = dict(zip(blocks, require_all(run, "refinement", names), strict=True))
        label = run.context.bits_label
        payload = AssemblyUnit(
            method.name,
            method,
            label,
            {role: assembled(method, records, refined.get(role)) for role, records in blocks.items()},
            checkpoint_path(run, method.name),
        )
        depends = {
            "model": run.context.model_fingerprint,
            "blocks": [record.fingerprint for records in blocks.values() for record in records],
            "bits": label,
            "max_shard_bytes": run.context.config.assembly.max_shard_bytes,
            "checkpoint": payload.checkpoint,
            "calibration": dict(self.settings(run).calibration),
            "inference": method.generation_values(),
            "refinement": [record.fingerprint for record in refined.values()],
        }
        return unit(self.name, method.name, payload, depends, in_run=True)


def assembled(method: MethodPlan, blocks: Sequence[UnitRecord], refined: UnitRecord | None) -> AssembledTransformer:
    """One transformer of a checkpoint.

    Args:
        blocks: records of its distillation.
        refined: the record of its refinement, None for a method without.
    """
    artifacts, sparse = block_artifacts(blocks), sparse_attention(method, blocks)
    if refined is None:
        return AssembledTransformer(artifacts, sparse)
    if sparse is not None and method.recipe.attention.measures_residual:
        sparse = MeasuredResidual.from_dict(refined.result["residual"]).applied(sparse)
    values = refined.result["velocity_correction"]
    velocity = None if values is None else VelocityCorrection.from_dict(values)
    return AssembledTransformer(with_repaired(artifacts, refined), sparse, velocity)


def block_artifacts(records: Sequence[UnitRecord]) -> tuple[str, ...]:
    """Logical names of the block artifacts that units have written."""
    outputs = [(record, output.path) for record in records for output in record.outputs]
    return tuple(f"{of.stage}/{of.unit}/{path}" for of, path in outputs if path.endswith(".safetensors"))


def with_repaired(artifacts: tuple[str, ...], refined: UnitRecord) -> tuple[str, ...]:
    """The artifacts, those of repaired blocks in place of the others of the same name."""
    repaired = {PurePosixPath(name).name: name for name in block_artifacts([refined])}
    return tuple(repaired.get(PurePosixPath(name).name, name) for name in artifacts)


def sparse_attention(method: MethodPlan, distilled: Sequence[UnitRecord]) -> SparseAttentionSpec | None:
    """What the checkpoint says of its attention, with the head kinds that the distillation found; None for dense."""
    spec = method.attention
    if method.recipe.sparse is None:
        return None
    if spec.online:
        return spec
    blocks = {name: block for record in distilled for name, block in record.result["blocks"].items()}
    kinds = {name: block["head_kinds"] for name, block in blocks.items() if name not in spec.dense_blocks}
    return replace(spec, head_kinds=kinds)


def checkpoint_path(run: Run, method: str) -> str:
    """Where a method's checkpoint is, relative to the run directory."""
    return run.directory.checkpoint_key(None if method == run.context.methods[0].name else method)
