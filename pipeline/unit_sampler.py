"""Which units of a run are done to measure all of them, and what stands for the others.

The units are planned as the driver plans them. The first of a kind is done; its record stands for those alike, so that what
depends on them reads its files.

| units | alike are |
|---|---|
| trajectories, activations | all |
| distillation | blocks of one method, shapes, bits and attention: of a segment each kind of block is done by itself |
| evaluation | prompts of one model; groups of as many prompts of one model |
| all others | none |

Time depends on shapes alone: another sample or block in its place changes none.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Generator, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cluster.actor_pool import Unit
from pipeline.context import Run
from pipeline.planning.block_memory import block_kinds
from pipeline.runner import STAGES
from pipeline.stages.assembly import block_artifacts
from pipeline.stages.stage import Stage, StageUnit
from reelquant.checkpoint.layer_packing import read_block_artifact, write_block_artifact
from storage.cache import UnitRecord, fingerprint
from storage.unit_store import UnitAddress, UnitStore
from workers.messages import EvaluationUnit, PromptUnit, SampleUnit, SegmentUnit, UnitOutput, VelocityUnit
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
    record: UnitRecord | None = None
    """Of the one."""

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
                with self.run.records.needs() as needs:
                    unit = planned.make()
                inputs = {name: of for name, of in needs.items() if of is not None}
                if isinstance(unit.payload, SegmentUnit) and unit.payload.blocks:
                    record = yield from self._segment(unit, inputs)
                else:
                    record = yield from self._one((self.stage.name, _kind(unit)), unit, inputs)
                self.run.records.add(replace(record, unit=unit.name))
                self.counts[self.stage.name] += 1

    def _segment(self, unit: StageUnit, inputs: Mapping[str, str]) -> Generator[Unit, UnitOutput, UnitRecord]:
        """One unit a kind of block; their artifacts are also those of the other blocks, by other names."""
        segment: SegmentUnit = unit.payload
        records: dict[str, UnitRecord] = {}
        kinds = block_kinds(self.run.context.model, segment.method)
        for block in segment.blocks:
            key = (self.stage.name, segment.method.name, kinds[block])
            name = f"{segment.method.name}-{block}"
            alone = SegmentUnit(name, segment.method, (block,), entry=segment.blocks[0])
            of = fingerprint({"block": block, "segment": unit.fingerprint})
            records[block] = yield from self._one(key, replace(unit, name=name, payload=alone, fingerprint=of), inputs)
        measured = {f"{record.stage}/{record.unit}": record.fingerprint for record in records.values()}
        with UnitStore(self._address(unit, measured)) as store:
            for block, record in records.items():
                [artifact] = block_artifacts([record])
                store.write_file(
                    f"{self.stage.name}/{unit.name}/{block}.safetensors",
                    partial(_write_renamed, store.file(artifact), block=block),
                )
            blocks = {block: next(iter(record.result["blocks"].values())) for block, record in records.items()}
            result = {"method": segment.method.name, "blocks": blocks}
            output = UnitOutput(result, "", 0, outputs=store.publish(), attempt=store.attempt)
        return self._recorded(unit, output)

    def _one(
        self, key: Hashable, unit: StageUnit, inputs: Mapping[str, str]
    ) -> Generator[Unit, UnitOutput, UnitRecord]:
        """The record that stands for a unit: its own where it is the first of its kind."""
        if key not in self.kinds:
            stage, full = self.stage, f"{self.stage.name}/{unit.name}"
            work = SharedUnit(
                stage.worker_class, stage.settings(self.run), unit.payload, self._address(unit, inputs), name=full
            )
            output = yield Unit(full, work, single=not unit.shared)
            self.kinds[key] = MeasuredKind(stage.name, unit.name, output, 0, self._recorded(unit, output))
        self.kinds[key].num += 1
        record = self.kinds[key].record
        assert record is not None
        return record

    def _address(self, unit: StageUnit, inputs: Mapping[str, str]) -> UnitAddress:
        run = self.run
        return UnitAddress(
            run.cache.location, run.directory.location, self.stage.name, unit.name, unit.fingerprint, inputs
        )

    def _recorded(self, unit: StageUnit, output: UnitOutput) -> UnitRecord:
        record = UnitRecord(
            self.stage.name, unit.name, unit.fingerprint, output.attempt, output.outputs, dict(output.result),
            seconds=0.0, host=socket.gethostname(), device=output.device, peak_memory_bytes=output.peak_memory_bytes,
            tries=1, worker="measured",
        )  # fmt: skip
        return self.run.cache.create(record, self.run.directory.place)


def _write_renamed(artifact: Path, path: Path, *, block: str) -> None:
    """A block's artifact as that of another block of its kind."""
    tensors, specs = read_block_artifact(artifact)
    measured = artifact.name.removesuffix(".safetensors")

    def renamed(name: str) -> str:
        return block + name.removeprefix(measured)

    layers = {renamed(name): replace(spec, group=renamed(spec.group)) for name, spec in specs.items()}
    write_block_artifact(path, {renamed(name): tensor for name, tensor in tensors.items()}, layers)


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
