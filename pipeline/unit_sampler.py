"""Which units of a run are done to measure all of them, and what stands for the others.

The units are planned in a run's directory as the driver plans them. The first of a kind is done; those alike take its outputs,
as links under their own names, so that what depends on them finds what it reads.

| units | alike are |
|---|---|
| trajectories, activations | all |
| distillation | blocks of one method, shapes, bits and attention: of a segment each kind of block is done by itself |
| evaluation | prompts of one model; groups of as many prompts of one model |
| all others | none |

Time depends on shapes alone: a link in place of another sample or block changes none.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections import Counter
from collections.abc import Generator, Hashable
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from cluster.actor_pool import Unit
from pipeline.context import Run
from pipeline.planning.block_memory import block_kinds
from pipeline.runner import STAGES
from pipeline.stages.selection import selected_samples
from pipeline.stages.stage import Stage, StageUnit
from reelquant.checkpoint.layer_packing import read_block_artifact, write_block_artifact
from storage.manifest import OutputFile, UnitRecord
from workers.messages import EvaluationUnit, MethodPlan, PromptUnit, SampleUnit, SegmentUnit, UnitOutput, VelocityUnit
from workers.shared_worker import SharedUnit


@dataclass
class MeasuredKind:
    """Units that are alike, one of which was done."""

    stage: str
    unit: str
    """Name of the one."""
    output: UnitOutput
    num: int = 1
    """Units of the run that are alike."""

    @property
    def seconds(self) -> float:
        """What the one took, without the opening of a model; with all that a process does once, such as compiling kernels."""
        assert self.output.usage is not None
        return self.output.usage.seconds


@dataclass
class UnitSampler:
    """Which units are done, and what stands for the others."""

    run: Run
    kinds: dict[Hashable, MeasuredKind] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    """Units by stage."""
    stage: Stage = STAGES[0]
    """Of the last unit."""

    def units(self) -> Generator[Unit, UnitOutput]:
        """The first unit of each kind, named `stage/unit`, each wanted when the one before is done: send its output."""
        for self.stage in STAGES:
            for planned in self.stage.plan(self.run):
                unit = planned.make()
                if isinstance(unit.payload, SegmentUnit) and unit.payload.blocks:
                    output = yield from self._segment(unit.payload)
                else:
                    output = yield from self._once(unit)
                self._record(unit, output)
                self.counts[self.stage.name] += 1

    def _once(self, unit: StageUnit) -> Generator[Unit, UnitOutput, UnitOutput]:
        key = (self.stage.name, _kind(unit))
        if key not in self.kinds:
            return (yield from self._first(key, unit.name, unit.payload, shared=unit.shared))
        known = self.kinds[key]
        known.num += 1
        outputs = [self._link(output, known.unit, unit.name) for output in known.output.outputs]
        return replace(known.output, outputs=tuple(outputs))

    def _segment(self, segment: SegmentUnit) -> Generator[Unit, UnitOutput, UnitOutput]:
        outputs: list[OutputFile] = []
        blocks: dict[str, Any] = {}
        kinds = block_kinds(self.run.context.model, segment.method)
        for block in segment.blocks:
            key = (self.stage.name, segment.method.name, kinds[block])
            if key not in self.kinds:
                self._link_entries(segment, block)
                name = f"{segment.method.name}-{block}"
                output = yield from self._first(key, name, SegmentUnit(name, segment.method, (block,)), shared=False)
                outputs += output.outputs
            else:
                known = self.kinds[key]
                known.num += 1
                outputs.append(self._renamed_block(known.output.outputs[0], segment.method, block))
            blocks[block] = next(iter(self.kinds[key].output.result["blocks"].values()))
        of = self.kinds[key].output
        return replace(of, outputs=tuple(outputs), result={"method": segment.method.name, "blocks": blocks})

    def _first(
        self, key: Hashable, name: str, payload: Any, *, shared: bool
    ) -> Generator[Unit, UnitOutput, UnitOutput]:
        stage, full = self.stage, f"{self.stage.name}/{name}"
        work = SharedUnit(stage.worker_class, stage.settings(self.run), payload, name=full)
        output = yield Unit(full, work, single=not shared)
        self.kinds[key] = MeasuredKind(stage.name, name, output)
        return output

    def _record(self, unit: StageUnit, output: UnitOutput) -> None:
        self.run.manifest.write(
            UnitRecord(
                self.stage.name, unit.name, unit.fingerprint, output.outputs, dict(output.result),
                seconds=0.0, host=socket.gethostname(), device=output.device, peak_memory_bytes=output.peak_memory_bytes,
                attempt=1, worker="measured",
            )
        )  # fmt: skip

    def _link(self, output: OutputFile, unit: str, name: str) -> OutputFile:
        """One of a unit's files as that of the unit `name`."""
        parts = (
            name + part.removeprefix(unit) if _names(part, unit) else part for part in PurePosixPath(output.path).parts
        )
        linked = replace(output, path=str(PurePosixPath(*parts)))
        target = self.run.directory.path / linked.path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(self.run.directory.path / output.path, target)
        return linked

    def _link_entries(self, segment: SegmentUnit, block: str) -> None:
        """The streams in front of a segment, as those in front of one of its blocks."""
        if block == segment.blocks[0] or not segment.method.recipe.needs_activations:
            return
        for sample in selected_samples(self.run):
            folder = self.run.directory.calibration_store.root / "activations" / sample.name
            if not (folder / block).exists():  # another method has it
                shutil.copytree(folder / segment.blocks[0], folder / block, copy_function=os.link)

    def _renamed_block(self, artifact: OutputFile, method: MethodPlan, block: str) -> OutputFile:
        """A block's artifact as that of another block of its kind."""
        run = self.run.directory
        measured = PurePosixPath(artifact.path).stem
        tensors, specs = read_block_artifact(run.path / artifact.path)

        def renamed(name: str) -> str:
            return block + name.removeprefix(measured)

        path = run.blocks(method.name) / f"{block}.safetensors"
        layers = {renamed(name): replace(spec, group=renamed(spec.group)) for name, spec in specs.items()}
        write_block_artifact(path, {renamed(name): tensor for name, tensor in tensors.items()}, layers)
        return OutputFile.describe(path, run=run.path)


def _kind(unit: StageUnit) -> Hashable:
    """What a unit has in common with those that take as long."""
    payload = unit.payload
    if isinstance(payload, PromptUnit | SampleUnit):
        return ""
    if isinstance(payload, EvaluationUnit):
        return unit.name.removesuffix(payload.prompt.name)
    if isinstance(payload, VelocityUnit):
        return unit.name.rpartition("-")[0], len(payload.prompts)
    return unit.name


def _names(part: str, unit: str) -> bool:
    """Whether a part of a path is the name of a unit, with an ending perhaps."""
    return part == unit or part.startswith(f"{unit}.")
