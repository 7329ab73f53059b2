"""What can begin when: by inputs and not by stages, on nothing but current records, and once for all runs that share a unit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.context import Run
from pipeline.event_log import EventLog, read_events
from pipeline.schedule import DrivenRun, Schedule, Task
from pipeline.stages.stage import StageUnit, UnitPlan, require, require_all
from storage.manifest import Manifest, OutputFile, UnitRecord, fingerprint
from storage.run_directory import RunDirectory

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
    directory = RunDirectory.open_or_create(path, {}, {})
    run = Run(None, directory, Manifest(directory))  # type: ignore[arg-type]  # these stages read no configuration
    return DrivenRun(run, EventLog(directory.logs), label)


def finish(schedule: Schedule, task: Task) -> None:
    record = UnitRecord(task.stage.name, task.unit.name, task.unit.fingerprint, (), {}, 1.0, "h", "cpu", 1, 1, "w")
    task.driven.run.manifest.write(record)
    schedule.finished(task, record)


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
    schedule = Schedule([run], stages())
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
    told = [(e["stage"], e["total"], e["pending"]) for e in read_events(run.run.directory.logs)]
    assert told == [("first", 2, 2), ("second", 2, 2), ("third", 2, 2), ("fourth", 1, 1)]


def complete(schedule: Schedule) -> list[str]:
    done = []
    while tasks := schedule.take_ready():
        for task in tasks:
            finish(schedule, task)
            done.append(task.pool_name)
    return done


def test_what_is_done_is_kept_and_nothing_is_built_on_older_records(tmp_path: Path) -> None:
    run = driven(tmp_path / "run")
    assert len(complete(Schedule([run], stages()))) == 7
    again = Schedule([run], stages())
    assert complete(again) == []
    assert again.counts.kept.total() == 7
    changed = Schedule([run], stages(version=1))
    first = changed.take_ready()
    assert names(first) == ["first/a", "first/b"], (
        "the records of second/a and of fourth/x are of an older configuration"
    )
    assert changed.view("").manifest.read("second", "a") is None
    for task in first:
        finish(changed, task)
    assert complete(changed) == ["second/a", "second/both", "third/late", "fourth/x"]
    assert changed.counts.kept == {"third": 1}


def test_a_unit_that_is_given_up_keeps_only_its_own_dependents_back(tmp_path: Path) -> None:
    run = driven(tmp_path / "run")
    schedule = Schedule([run], stages())
    tasks = {task.pool_name: task for task in schedule.take_ready()}
    assert schedule.failed(tasks["first/b"]) == [run]
    finish(schedule, tasks["first/a"])
    finish(schedule, tasks["third/free"])
    assert complete(schedule) == ["second/a", "third/late"]


def test_a_unit_of_two_runs_is_done_once(tmp_path: Path) -> None:
    one, two = driven(tmp_path / "one", "one"), driven(tmp_path / "two", "two")
    schedule = Schedule([one, two], stages())
    tasks = schedule.take_ready()
    assert names(tasks) == ["one/first/a", "one/first/b", "one/third/free"]
    assert schedule.failed(tasks[1]) == [one, two]
    finish(schedule, tasks[0])
    assert schedule.counts.adopted == {"first": 1}
    adopted = two.run.manifest.read("first", "a")
    assert adopted is not None
    assert adopted.worker == "adopted from one"


def test_a_shared_unit_whose_files_are_lost_is_done_anew_by_the_run_that_waited_for_it(tmp_path: Path) -> None:
    one, two, three = (driven(tmp_path / name, name) for name in ("one", "two", "three"))
    schedule = Schedule([one, two, three], [PlainStage("first", {"a": ()})])
    [task] = schedule.take_ready()
    output = one.run.directory.path / "a.bin"
    output.write_bytes(b"content")
    described = OutputFile.describe(output, run=one.run.directory.path)
    record = UnitRecord("first", "a", task.unit.fingerprint, (described,), {}, 1.0, "h", "cpu", 1, 1, "w")
    one.run.manifest.write(record)
    output.unlink()
    schedule.finished(task, record)
    [again] = schedule.take_ready()
    assert again.pool_name == "two/first/a", "once, although two runs wait for it"
    problems = [e["problems"] for e in read_events(one.run.directory.logs) if e["event"] == "unit_damaged"]
    assert "a.bin" in problems[0][0]
    finish(schedule, again)
    adopted = three.run.manifest.read("first", "a")
    assert adopted is not None
    assert adopted.worker == "adopted from two"
    assert (schedule.counts.done.total(), schedule.counts.adopted.total()) == (2, 1)
    assert schedule.take_ready() == []


def test_what_another_run_has_done_before_is_adopted(tmp_path: Path) -> None:
    two = driven(tmp_path / "two", "two")
    complete(Schedule([two], stages()))
    one = driven(tmp_path / "one", "one")
    schedule = Schedule([one, two], stages())
    assert complete(schedule) == [], "although the other comes later in the list"
    assert schedule.counts.adopted.total() == schedule.counts.kept.total() == 7
