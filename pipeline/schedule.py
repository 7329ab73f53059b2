"""What of one run or many can begin now: every unit whose inputs are done, whatever stage it belongs to.

    plans of all stages -> made, or waiting for named units -> done before: counts as done
                                                            -> done by another run: adopted
                                                            -> another run has it under way: adopted later
                                                            -> a task for the workers

A unit of two runs is the same where name and fingerprint are: the same files with the same bytes.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.context import Run
from pipeline.event_log import EventLog
from pipeline.stages.stage import NotDone, Stage, StageUnit, UnitPlan
from pipeline.study.adoption import adopt
from storage.manifest import Manifest, UnitRecord

_logger = logging.getLogger(__name__)

Key = tuple[str, str, str]
"""Stage, name and fingerprint of a unit."""


@dataclass(frozen=True)
class DrivenRun:
    """A run under this driver's lock."""

    run: Run
    log: EventLog
    label: str = ""
    """Stands in front of its units' names where several runs are driven at once."""
    planned_bytes: Mapping[str, int] = field(default_factory=dict)
    """What the plan says one worker takes, by stage; for messages."""

    def full_name(self, unit: str) -> str:
        """Of a unit, in the pool and for people."""
        return f"{self.label}/{unit}" if self.label else unit


@dataclass(frozen=True)
class Task:
    """One unit of a run, to be done now."""

    driven: DrivenRun
    stage: Stage
    settings: Any
    """Of the worker."""
    unit: StageUnit
    priority: int
    """The earlier the stage, the more waits for it."""

    @property
    def name(self) -> str:
        """For people."""
        return self.driven.full_name(self.unit.name)

    @property
    def pool_name(self) -> str:
        """Unique among all tasks."""
        return self.driven.full_name(f"{self.stage.name}/{self.unit.name}")

    @property
    def key(self) -> Key:
        """The same in all runs that have the unit."""
        return (self.stage.name, self.unit.name, self.unit.fingerprint)

    @property
    def affinity(self) -> str:
        """What one worker should do in a row: units of one run, and in it those that read the same model."""
        return self.driven.full_name(self.unit.affinity)


class CurrentRecords(Manifest):
    """A run's manifest of which only those records are seen that this driver has found to be of the present configuration, or
    has written: what an older configuration left behind is there until its unit is done again, and must not be built on."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest.location)
        self._current: dict[tuple[str, str], UnitRecord] = {}

    def add(self, record: UnitRecord) -> None:
        """From now on it is seen."""
        self._current[record.stage, record.unit] = record

    def read(self, stage: str, unit: str) -> UnitRecord | None:
        """The record, if it is current."""
        return self._current.get((stage, unit))


@dataclass(eq=False)
class _Item:
    """A stage whose units are to be listed, or a unit that is to be made."""

    driven: DrivenRun
    stage: Stage
    plan: UnitPlan | None = None
    missing: set[tuple[str, str]] = field(default_factory=set)


@dataclass
class Counts:
    """Units by stage."""

    done: Counter[str] = field(default_factory=Counter)
    """By workers, now."""
    adopted: Counter[str] = field(default_factory=Counter)
    """Taken over from another run, now."""
    kept: Counter[str] = field(default_factory=Counter)
    """Done before."""


class Schedule:
    """Lists, makes and hands out the units of runs; the caller says which are done.

    Args:
        runs: each with its own label.
        stages: in order.
        planned: called with every stage whose units have become known, and their full names.
        settled: called with the stage and the full name of every unit that is done without a worker.
    """

    def __init__(
        self,
        runs: Sequence[DrivenRun],
        stages: Sequence[Stage],
        *,
        planned: Callable[[Stage, Sequence[str]], None] = lambda stage, units: None,
        settled: Callable[[Stage, str], None] = lambda stage, unit: None,
    ) -> None:
        self.counts = Counts()
        self._planned, self._settled = planned, settled
        self._records = {driven.label: CurrentRecords(driven.run.manifest) for driven in runs}
        self._views = {driven.label: replace(driven.run, manifest=self._records[driven.label]) for driven in runs}
        self._priorities = {stage.name: index for index, stage in enumerate(stages)}
        self._open = deque(_Item(driven, stage) for stage in stages for driven in runs)
        self._undone: list[tuple[DrivenRun, Stage, StageUnit]] = []
        self._waiting: defaultdict[tuple[str, str, str], list[_Item]] = defaultdict(list)
        self._sources: dict[Key, DrivenRun] = {}
        """A run that has done the unit."""
        self._takers: dict[Key, list[DrivenRun]] = {}
        """Of units under way: the other runs that have it."""
        self._settings: dict[tuple[str, str], Any] = {}
        self._ready: list[Task] = []

    def view(self, label: str) -> Run:
        """The run, with the records that are current."""
        return self._views[label]

    def take_ready(self) -> list[Task]:
        """Tasks that can begin now and were not handed out yet."""
        self._advance()
        ready, self._ready = self._ready, []
        return ready

    def finished(self, task: Task, record: UnitRecord) -> None:
        """A worker has done the task, and its record is written."""
        self.counts.done[task.stage.name] += 1
        self._sources[task.key] = task.driven
        self._mark_done(task.driven, record)
        for taker in self._takers.pop(task.key):
            self._begin(taker, task.stage, task.unit)

    def failed(self, task: Task) -> list[DrivenRun]:
        """The task is given up: the runs that it is missing in."""
        return [task.driven, *self._takers.pop(task.key)]

    def _advance(self) -> None:
        listed: list[tuple[_Item, list[UnitPlan]]] = []
        while self._open or self._undone:
            while self._open:
                item = self._open.popleft()
                try:
                    if item.plan is None:
                        listed.append((item, self._list(item)))
                    else:
                        self._take(item.driven, item.stage, item.plan.make())
                except NotDone as error:
                    self._wait(item, error.missing)
            # Only now: another of the runs may have been found to have done the same.
            undone, self._undone = self._undone, []
            for driven, stage, unit in undone:
                self._begin(driven, stage, unit)
        for item, plans in listed:
            records = self._records[item.driven.label]
            pending = sum(records.read(item.stage.name, plan.name) is None for plan in plans)
            if plans:
                item.driven.log.write("stage", stage=item.stage.name, total=len(plans), pending=pending)

    def _list(self, item: _Item) -> list[UnitPlan]:
        plans = item.stage.plan(self._views[item.driven.label])
        self._open.extend(_Item(item.driven, item.stage, plan) for plan in plans)
        if plans:
            self._planned(item.stage, [item.driven.full_name(plan.name) for plan in plans])
        return plans

    def _wait(self, item: _Item, missing: Iterable[tuple[str, str]]) -> None:
        item.missing = set(missing)
        for stage, name in item.missing:
            self._waiting[item.driven.label, stage, name].append(item)

    def _take(self, driven: DrivenRun, stage: Stage, unit: StageUnit) -> None:
        record = done_record(driven.run, stage.name, unit)
        if record is None:
            self._undone.append((driven, stage, unit))
            return
        self.counts.kept[stage.name] += 1
        self._settled(stage, driven.full_name(unit.name))
        self._sources.setdefault((stage.name, unit.name, unit.fingerprint), driven)
        self._mark_done(driven, record)

    def _begin(self, driven: DrivenRun, stage: Stage, unit: StageUnit) -> None:
        key = (stage.name, unit.name, unit.fingerprint)
        if key in self._sources and self._adopt(driven, stage, unit):
            return
        if key in self._takers:
            self._takers[key].append(driven)
            return
        self._takers[key] = []
        of = (driven.label, stage.name)
        if of not in self._settings:
            self._settings[of] = stage.settings(self._views[driven.label])
        self._ready.append(Task(driven, stage, self._settings[of], unit, self._priorities[stage.name]))

    def _adopt(self, taker: DrivenRun, stage: Stage, unit: StageUnit) -> bool:
        """Whether the unit is done for `taker` too; where the source's files are no longer sound, it has to be done anew."""
        source = self._sources[stage.name, unit.name, unit.fingerprint]
        record = done_record(source.run, stage.name, unit)
        problems = ["its record is gone"]
        if record is not None:
            problems = adopt(record, source=source.run, source_label=source.label, taker=taker.run)
        if record is None or problems:
            shown = source.full_name(f"{stage.name}/{unit.name}")
            _logger.warning("%s cannot be adopted by %s: %s", shown, taker.label, "; ".join(problems))
            source.log.write("unit_damaged", stage=stage.name, unit=unit.name, problems=problems)
            return False
        # Not under `unit`: the timeline is of what was worked on.
        taker.log.write("unit_adopted", stage=stage.name, name=unit.name, source=source.label)
        self.counts.adopted[stage.name] += 1
        self._settled(stage, taker.full_name(unit.name))
        self._mark_done(taker, record)
        return True

    def _mark_done(self, driven: DrivenRun, record: UnitRecord) -> None:
        self._records[driven.label].add(record)
        for item in self._waiting.pop((driven.label, record.stage, record.unit), ()):
            item.missing.discard((record.stage, record.unit))
            if not item.missing:
                self._open.append(item)


def done_record(run: Run, stage: str, unit: StageUnit) -> UnitRecord | None:
    """The record of a unit that is done."""
    record = run.manifest.read(stage, unit.name)
    return record if record is not None and record.fingerprint == unit.fingerprint else None
