"""What of one run or many can begin now: every unit whose inputs are done, whatever stage it belongs to.

    plans of all stages -> made, or waiting for named units -> done before: counts as done
                                                            -> under way for another run: done with it
                                                            -> a task for the workers

A unit of two runs is the same where stage and fingerprint are: one record in their cache.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.context import Run
from pipeline.done_units import DoneUnits
from pipeline.event_log import EventLog
from pipeline.stages.stage import NotDone, Stage, StageUnit, UnitPlan
from storage.cache import UnitRecord
from storage.run_directory import ListedUnit
from storage.unit_store import UnitAddress

Key = tuple[str, str, str]
"""Stage and fingerprint of a unit; and the label of the run whose own it is."""


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
    address: UnitAddress
    """Where its files lie."""

    @property
    def name(self) -> str:
        """For people."""
        return self.driven.full_name(self.unit.name)

    @property
    def pool_name(self) -> str:
        """Unique among all tasks."""
        return self.driven.full_name(f"{self.stage.name}/{self.unit.name}")

    @property
    def affinity(self) -> str:
        """What one worker should do in a row: units of one run, and in it those that read the same model."""
        return self.driven.full_name(self.unit.affinity)


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
    shared: Counter[str] = field(default_factory=Counter)
    """By workers for another run, now."""
    kept: Counter[str] = field(default_factory=Counter)
    """Done before."""


class Schedule:
    """Lists, makes and hands out the units of runs; the caller says which are done.

    Args:
        runs: each with its own label.
        stages: in order.
        done: finds the units that were done before.
        planned: called with every stage whose units have become known, and their full names.
        settled: called with the stage and the full name of every unit that is done without a worker.
    """

    def __init__(
        self,
        runs: Sequence[DrivenRun],
        stages: Sequence[Stage],
        done: DoneUnits,
        *,
        planned: Callable[[Stage, Sequence[str]], None] = lambda stage, units: None,
        settled: Callable[[Stage, str], None] = lambda stage, unit: None,
    ) -> None:
        self.counts = Counts()
        self._done, self._planned, self._settled = done, planned, settled
        self._priorities = {stage.name: index for index, stage in enumerate(stages)}
        self._open = deque(_Item(driven, stage) for stage in stages for driven in runs)
        self._waiting: defaultdict[tuple[str, str, str], list[_Item]] = defaultdict(list)
        self._takers: dict[Key, list[DrivenRun]] = {}
        """Of units under way: the other runs that have it."""
        self._settings: dict[tuple[str, str], Any] = {}
        self._ready: list[Task] = []
        self._listed = {driven.label: _listed_before(driven) for driven in runs}
        """By run, stage and name: what was listed before, until its stage and then its unit are come to."""
        self._changed: dict[str, DrivenRun] = {}
        """Runs whose list of units is not written."""

    def take_ready(self) -> list[Task]:
        """Tasks that can begin now and were not handed out yet."""
        self._advance()
        ready, self._ready = self._ready, []
        return ready

    def finished(self, task: Task, record: UnitRecord) -> None:
        """A worker has done the task, and its record is written."""
        self.counts.done[task.stage.name] += 1
        self._done.finished(task.driven.run, record)
        self._mark_done(task.driven, record)
        for taker in self._takers.pop(_key(task.driven, task.stage, task.unit)):
            self.counts.shared[task.stage.name] += 1
            self._settled(task.stage, taker.full_name(task.unit.name))
            self._mark_done(taker, record)

    def failed(self, task: Task) -> list[DrivenRun]:
        """The task is given up: the runs that it is missing in."""
        return [task.driven, *self._takers.pop(_key(task.driven, task.stage, task.unit))]

    def _advance(self) -> None:
        new: list[tuple[_Item, list[UnitPlan]]] = []
        while self._open:
            item = self._open.popleft()
            try:
                if item.plan is None:
                    new.append((item, self._list(item)))
                else:
                    self._make(item.driven, item.stage, item.plan)
            except NotDone as error:
                self._wait(item, error.missing)
        for item, plans in new:
            records = item.driven.run.records.all()
            pending = sum((item.stage.name, plan.name) not in records for plan in plans)
            if plans:
                item.driven.log.write("stage", stage=item.stage.name, total=len(plans), pending=pending)
        for label, driven in self._changed.items():
            stages = {stage: tuple(units.values()) for stage, units in self._listed[label].items()}
            driven.run.directory.write_units(stages)
        self._changed = {}

    def _list(self, item: _Item) -> list[UnitPlan]:
        driven, stage = item.driven, item.stage
        plans = stage.plan(driven.run)
        known = self._listed[driven.label].get(stage.name, {})
        kept = {plan.name: known.get(plan.name, ListedUnit(plan.name)) for plan in plans}
        if list(known.values()) != list(kept.values()):
            self._listed[driven.label].pop(stage.name, None)
        self._note(driven, stage, *kept.values())
        self._open.extend(_Item(driven, stage, plan) for plan in plans)
        if plans:
            self._planned(stage, [driven.full_name(plan.name) for plan in plans])
        return plans

    def _make(self, driven: DrivenRun, stage: Stage, plan: UnitPlan) -> None:
        with driven.run.records.needs() as needs:
            unit = plan.make()
        self._note(driven, stage, ListedUnit(plan.name, unit.fingerprint, tuple(needs)))
        under_way = _key(driven, stage, unit) in self._takers
        record = None if under_way else self._done.find(driven.run, stage.name, unit)
        if record is not None:
            self.counts.kept[stage.name] += 1
            self._settled(stage, driven.full_name(unit.name))
            self._mark_done(driven, record)
        else:
            self._begin(driven, stage, unit, needs)

    def _begin(self, driven: DrivenRun, stage: Stage, unit: StageUnit, needs: Mapping[str, str | None]) -> None:
        key = _key(driven, stage, unit)
        if key in self._takers:
            self._takers[key].append(driven)
            return
        self._takers[key] = []
        of = (driven.label, stage.name)
        if of not in self._settings:
            self._settings[of] = stage.settings(driven.run)
        run = driven.run
        inputs = {name: fingerprint for name, fingerprint in needs.items() if fingerprint is not None}
        address = UnitAddress(
            run.cache.location, run.directory.location, stage.name, unit.name, unit.fingerprint, inputs
        )
        self._ready.append(Task(driven, stage, self._settings[of], unit, self._priorities[stage.name], address))

    def _wait(self, item: _Item, missing: Iterable[tuple[str, str]]) -> None:
        item.missing = set(missing)
        if item.plan is not None:
            needs = tuple(sorted("/".join(key) for key in item.missing))
            known = self._listed[item.driven.label].get(item.stage.name, {}).get(item.plan.name)
            fingerprint = None if known is None else known.fingerprint
            self._note(item.driven, item.stage, ListedUnit(item.plan.name, fingerprint, needs))
        for stage, name in item.missing:
            self._waiting[item.driven.label, stage, name].append(item)

    def _mark_done(self, driven: DrivenRun, record: UnitRecord) -> None:
        driven.run.records.add(record)
        for item in self._waiting.pop((driven.label, record.stage, record.unit), ()):
            item.missing.discard((record.stage, record.unit))
            if not item.missing:
                self._open.append(item)

    def _note(self, driven: DrivenRun, stage: Stage, *units: ListedUnit) -> None:
        stages = self._listed[driven.label]
        if stage.name not in stages or any(stages[stage.name].get(unit.name) != unit for unit in units):
            stages.setdefault(stage.name, {}).update({unit.name: unit for unit in units})
            self._changed[driven.label] = driven


def _listed_before(driven: DrivenRun) -> dict[str, dict[str, ListedUnit]]:
    try:
        found = driven.run.directory.units()
    except ValueError:  # written anew
        return {}
    return {stage: {unit.name: unit for unit in units} for stage, units in found.items()}


def _key(driven: DrivenRun, stage: Stage, unit: StageUnit) -> Key:
    return (stage.name, unit.fingerprint, driven.label if unit.in_run else "")
