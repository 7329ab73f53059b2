"""What can begin when: by inputs and not by stages, on nothing but current records, and once for all runs that share a unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.context import Run
from pipeline.done_units import DoneUnits
from pipeline.event_log import EventLog, read_events
from pipeline.schedule import DrivenRun, Schedule, Task
from pipeline.stages.stage import StageUnit, UnitPlan, require, require_all
from storage.cache import Cache, UnitRecord, fingerprint
from storage.run_directory import ListedUnit, RunDirectory

Names = Mapping[str, tuple[str, ...]]
"""Units, and those that each depends on, as `stage/unit`."""


class PlainStage:
    """Units that depend on others by name, and all on `version`."""

    worker_class = object

    def __init__(self, name: str, units: Names, *, listed_after: str | None = None, version: int = 0) -> None:
        self.name = self.title = name
        self._units, self._listed_after, self._version = units, listed_after, version

    def settings(self, run: Run) -> str:
        return self.name

    def plan(self, run: Run) -> list[UnitPlan]:
        if self._listed_after is not None:
            require(run, *self._listed_after.split("/"))
        return [UnitPlan(name, partial(self._unit, run, name)) for name in self._units]

    def _unit(self, run: Run, name: str) -> StageUnit:
        inputs = [key.split("/") for key in self._units[name]]
        stages = {stage: [unit for of, unit in inputs if of == stage] for stage, _ in inputs}
        upstream = [record.fingerprint for stage, names in stages.items() for record in require_all(run, stage, names)]
        covered = fingerprint({"stage": self.name, "name": name, "upstream": upstream, "version": self._version})
        return StageUnit(name, None, covered)


def driven(path: Path, label: str = "") -> DrivenRun:
    """A run; those side by side share a cache."""
    directory = RunDirectory.open_or_create(path, {}, {}, cache=path.parent / "cache")
    run = Run(None, directory, Cache(path.parent / "cache"))  # type: ignore[arg-type]  # these stages read no configuration
    return DrivenRun(run, EventLog(directory.location), label)


def scheduled(runs: list[DrivenRun], stages: Sequence[PlainStage]) -> Schedule:
    return Schedule(runs, stages, DoneUnits(lambda *_: None))


def finish(schedule: Schedule, task: Task) -> None:
    unit, run = task.unit, task.driven.run
    record = UnitRecord(task.stage.name, unit.name, unit.fingerprint, "1", (), {}, 1.0, "h", "cpu", 1, 1, "w")
    schedule.finished(task, run.cache.create(record, run.directory.place))


def names(tasks: list[Task]) -> list[str]:
    return [task.pool_name for task in tasks]


def stages(**changes: Any) -> list[PlainStage]:
    return [
        PlainStage("first", {"a": (), "b": ()}, **changes),
        PlainStage("second", {"a": ("first/a",), "both": ("first/a", "first/b")}),
        PlainStage("third", {"free": (), "late": ("second/a", "third/free")}),
        PlainStage("fourth", {"x": ("first/b",)}, listed_after="second/a"),
    ]


def test_a_unit_begins_when_its_inputs_are_done_whatever_the_stage(tmp_path: Path) -> None:
    run = driven(tmp_path / "run")
    schedule = scheduled([run], stages())
    tasks = {task.pool_name: task for task in schedule.take_ready()}
    assert list(tasks) == ["first/a", "first/b", "third/free"]
    assert [task.priority for task in tasks.values()] == [0, 0, 2]
    assert schedule.take_ready() == []
    finish(schedule, tasks["third/free"])
    assert schedule.take_ready() == []
    finish(schedule, tasks["first/a"])
    [second] = schedule.take_ready()
    assert second.pool_name == "second/a"
    assert second.settings == "second"
    finish(schedule, second)
    assert names(schedule.take_ready()) == ["third/late"]
    finish(schedule, tasks["first/b"])
    assert names(schedule.take_ready()) == ["second/both", "fourth/x"]
    assert schedule.counts.done == {"first": 2, "second": 1, "third": 1}
    told = [(e["stage"], e["total"], e["pending"]) for e in read_events(run.run.directory.location)]
    assert told == [("first", 2, 2), ("second", 2, 2), ("third", 2, 2), ("fourth", 1, 1)]


def complete(schedule: Schedule) -> list[str]:
    done = []
    while tasks := schedule.take_ready():
        for task in tasks:
            finish(schedule, task)
            done.append(task.pool_name)
    return done


def test_what_is_done_is_kept_and_nothing_is_built_on_older_records(tmp_path: Path) -> None:
    assert len(complete(scheduled([driven(tmp_path / "run")], stages()))) == 7
    again = scheduled([driven(tmp_path / "run")], stages())
    assert complete(again) == []
    assert again.counts.kept.total() == 7
    run = driven(tmp_path / "run")
    changed = scheduled([run], stages(version=1))
    first = changed.take_ready()
    assert names(first) == ["first/a", "first/b"], (
        "the records of second/a and of fourth/x are of an older configuration"
    )
    assert run.run.records.read("second", "a") is None
    for task in first:
        finish(changed, task)
    assert complete(changed) == ["second/a", "second/both", "third/late", "fourth/x"]
    assert changed.counts.kept == {"third": 1}


def test_the_run_lists_its_units_as_they_become_known(tmp_path: Path) -> None:
    run = driven(tmp_path / "run")
    schedule = scheduled([run], stages())
    tasks = {task.pool_name: task for task in schedule.take_ready()}
    listed = run.run.directory.units()
    assert {stage: [unit.name for unit in units] for stage, units in listed.items()} == {
        "first": ["a", "b"], "second": ["a", "both"], "third": ["free", "late"],
    }  # fmt: skip
    assert listed["first"][0] == ListedUnit("a", tasks["first/a"].unit.fingerprint)
    assert listed["second"][1] == ListedUnit("both", None, ("first/a", "first/b"))
    complete(scheduled([driven(tmp_path / "run")], stages()))
    listed = run.run.directory.units()
    assert listed["second"][1].needs == ("first/a", "first/b")
    assert all(unit.fingerprint is not None for units in listed.values() for unit in units)
    assert len(run.run.directory.records()) == 7


def test_what_was_listed_stays_until_it_is_come_to(tmp_path: Path) -> None:
    """A driver that does the first stages alone, or is killed while a unit is redone, leaves the list of all."""
    complete(scheduled([driven(tmp_path / "run")], stages()))
    whole = driven(tmp_path / "run").run.directory.units()
    assert complete(scheduled([driven(tmp_path / "run")], stages()[:1])) == []
    run = driven(tmp_path / "run").run
    assert run.directory.units() == whole
    lost = run.directory.records("first")["first", "a"]
    assert isinstance(lost, UnitRecord)
    run.cache.remove(lost.stage, lost.fingerprint)
    assert names(scheduled([driven(tmp_path / "run")], stages()).take_ready()) == ["first/a"]
    found = run.directory.units()
    assert {s: [u.fingerprint for u in units] for s, units in found.items()} == {
        s: [u.fingerprint for u in units] for s, units in whole.items()
    }


def test_a_unit_is_told_the_fingerprints_of_what_it_reads(tmp_path: Path) -> None:
    run = driven(tmp_path / "run")
    schedule = scheduled([run], stages())
    first = {task.pool_name: task for task in schedule.take_ready()}
    finish(schedule, first["first/a"])
    [second] = schedule.take_ready()
    assert second.address.inputs == {"first/a": first["first/a"].unit.fingerprint}
    assert (second.address.stage, second.address.fingerprint) == ("second", second.unit.fingerprint)


def test_a_unit_that_is_given_up_keeps_only_its_own_dependents_back(tmp_path: Path) -> None:
    run = driven(tmp_path / "run")
    schedule = scheduled([run], stages())
    tasks = {task.pool_name: task for task in schedule.take_ready()}
    assert schedule.failed(tasks["first/b"]) == [run]
    finish(schedule, tasks["first/a"])
    finish(schedule, tasks["third/free"])
    assert complete(schedule) == ["second/a", "third/late"]


def test_a_unit_of_two_runs_is_done_once(tmp_path: Path) -> None:
    one, two = driven(tmp_path / "one", "one"), driven(tmp_path / "two", "two")
    schedule = scheduled([one, two], stages())
    tasks = schedule.take_ready()
    assert names(tasks) == ["one/first/a", "one/first/b", "one/third/free"]
    assert schedule.failed(tasks[1]) == [one, two]
    finish(schedule, tasks[0])
    assert schedule.counts.shared == {"first": 1}
    found = two.run.records.read("first", "a")
    assert found is not None
    assert found == one.run.records.read("first", "a")


def test_a_checkpoint_is_made_for_every_run_of_its_own(tmp_path: Path) -> None:
    class InRun(PlainStage):
        def _unit(self, run: Run, name: str) -> StageUnit:
            return replace(super()._unit(run, name), in_run=True)

    one, two = driven(tmp_path / "one", "one"), driven(tmp_path / "two", "two")
    schedule = scheduled([one, two], [InRun("assembly", {"a": ()})])
    assert names(schedule.take_ready()) == ["one/assembly/a", "two/assembly/a"]


def test_what_another_run_has_done_before_is_kept(tmp_path: Path) -> None:
    complete(scheduled([driven(tmp_path / "two", "two")], stages()))
    schedule = scheduled([driven(tmp_path / "one", "one"), driven(tmp_path / "two", "two")], stages())
    assert complete(schedule) == []
    assert schedule.counts.kept.total() == 14
