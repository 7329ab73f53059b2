"""Drives all runs of a study stage by stage, in one pool of workers; what several runs have in common is done once.

    for every stage and wave: pending units of all runs -> those that another run has done are adopted
                                                        -> of the rest one of each (name, fingerprint) -> workers
                                                        -> record in its run, adopted by the others that wait for it

A run whose unit fails for good is set aside; the others go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cluster.actor_pool import UnitsFailed
from pipeline.context import Run
from pipeline.run_state import last_line
from pipeline.runner import STAGES, driven_runs, open_run, provenance
from pipeline.stages.stage import Stage, StageUnit
from pipeline.study.adoption import adopt
from pipeline.study.preparation import PreparedStudy
from pipeline.wave import DrivenRun, LazySession, Task, done_record, pending_units, run_tasks
from storage.atomic_files import create_directory, write_json_atomic
from storage.manifest import UnitRecord
from storage.run_directory import RunConfigMismatch, RunDirectory
from workers.shared_worker import SharedUnit, SharedWorker

STUDY_FILE = "study.json"
"""Says that a directory is a study; as the file was written the last time it was driven."""

FORMAT_VERSION = 1

Key = tuple[str, str]
"""Name and fingerprint of a unit: the same in two runs means the same files with the same bytes."""


@dataclass(frozen=True)
class Failure:
    """Why a run was set aside."""

    stage: str
    unit: str
    error: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.unit}: {last_line(self.error)}"


@dataclass
class StudyOutcome:
    """What a call of `run_study` did."""

    runs: Mapping[str, Run]
    """By label, those set aside too."""
    done: int = 0
    """Units done now."""
    adopted: int = 0
    """Units taken over from another run now."""
    kept: int = 0
    """Units that were done before."""
    failures: dict[str, Failure] = field(default_factory=dict)
    """By label, the first of each run."""


def run_study(prepared: PreparedStudy, console: Console, *, update: bool = False) -> StudyOutcome:
    """Does all that is not done yet, under the locks of the study and of all its runs.

    Raises:
        ValueError: the study's directory is something else, or one of its runs has another configuration.
        RunLocked: another driver works on the study or on one of its runs.
        WorkersFailed: no worker could be started; everything done is kept.
    """
    path = prepared.study.path.absolute()
    _open_directory(path)
    with RunDirectory(path).lock():
        document = {"format_version": FORMAT_VERSION, "study": prepared.study.written.model_dump(mode="json")}
        write_json_atomic(path / STUDY_FILE, {**document, "provenance": provenance()})
        runs = _open_runs(prepared, update=update)
        config = prepared.study.runs[0].config
        with driven_runs(runs, console) as driven, LazySession(config) as session:
            drive = _Drive(driven, session, console, StudyOutcome(runs))
            for stage in STAGES:
                drive.stage(stage)
            for run in drive.live:
                run.log.write("run_finished")
    return drive.outcome


def _open_directory(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"study: {path} is a file: give a directory for the study")
    if path.is_dir() and not (path / STUDY_FILE).is_file():
        foreign = sorted(entry.name for entry in path.iterdir() if entry.name != "run.lock" and not _is_partial(entry))
        if foreign:
            raise ValueError(
                f"study: {path} is not empty and not a study (holds {', '.join(foreign[:5])}): give a new or empty directory"
            )
    create_directory(path)


def _open_runs(prepared: PreparedStudy, *, update: bool) -> dict[str, Run]:
    runs, problems = {}, []
    for label, context in prepared.contexts.items():
        try:
            runs[label] = open_run(context, update=update)
        except RunConfigMismatch as error:
            problems.append(str(error))
    if problems:
        raise RunConfigMismatch("\n".join(problems))
    return runs


def _is_partial(entry: Path) -> bool:
    return entry.name.startswith(f".{STUDY_FILE}.")


class _Drive:
    def __init__(
        self, runs: Sequence[DrivenRun], session: LazySession, console: Console, outcome: StudyOutcome
    ) -> None:
        self.live = list(runs)
        self.outcome = outcome
        self._session, self._console = session, console

    def stage(self, stage: Stage) -> None:
        waves = {driven.label: stage.waves(driven.run) for driven in self.live}
        for index in range(max((len(found) for found in waves.values()), default=0)):
            self._wave(stage, {label: found[index] for label, found in waves.items() if index < len(found)})

    def _wave(self, stage: Stage, waves: Mapping[str, list[StageUnit]]) -> None:
        """One wave of all runs that are left. `waves` is by label."""
        done: dict[Key, DrivenRun] = {}
        pending: list[tuple[DrivenRun, StageUnit]] = []
        for driven in self.live:
            if driven.label not in waves:  # says nothing of a stage in which it has no units, as a run of its own
                continue
            units = waves[driven.label]
            left = pending_units(driven, stage, units)
            names = {unit.name for unit in left}
            done.update({_key(unit): driven for unit in units if unit.name not in names})
            pending += [(driven, unit) for unit in left]
            self.outcome.kept += len(units) - len(left)
        first: dict[Key, Task] = {}
        waiting: dict[Key, list[DrivenRun]] = {}
        settings: dict[str, Any] = {}
        for driven, unit in pending:
            key = _key(unit)
            if key in done and self._adopt(stage, unit, source=done[key], taker=driven):
                continue
            if key in first:
                waiting[key].append(driven)
            else:
                # Runs one after the other: a worker is made anew for every run it comes to.
                if driven.label not in settings:
                    settings[driven.label] = stage.settings(driven.run)
                payload = SharedUnit(settings[driven.label], unit.payload)
                first[key], waiting[key] = Task(driven, unit, payload), []
        if first:
            num_done = len(done.keys() - first.keys())
            with self._failures_set_aside(stage, first, waiting):
                self._do(stage, list(first.values()), waiting, num_done=num_done)

    def _do(
        self, stage: Stage, tasks: Sequence[Task], waiting: Mapping[Key, Sequence[DrivenRun]], *, num_done: int
    ) -> None:
        def recorded(task: Task, record: UnitRecord) -> None:
            self.outcome.done += 1
            for taker in waiting[_key(task.unit)]:
                adopted = self._adopt(stage, task.unit, source=task.driven, taker=taker)
                assert adopted, f"{task.name} was recorded, and its files are not sound"

        self._session.open()
        run_tasks(
            stage,
            tasks,
            worker=(SharedWorker, stage.worker_class),
            num_done=num_done,
            console=self._console,
            recorded=recorded,
        )

    def _adopt(self, stage: Stage, unit: StageUnit, *, source: DrivenRun, taker: DrivenRun) -> bool:
        record = done_record(source.run, stage.name, unit)
        if record is None or adopt(record, source=source.run, source_label=source.label, taker=taker.run):
            return False
        # Not under `unit`: the timeline is of what was worked on.
        taker.log.write("unit_adopted", stage=stage.name, name=unit.name, source=source.label)
        self.outcome.adopted += 1
        return True

    @contextlib.contextmanager
    def _failures_set_aside(
        self, stage: Stage, first: Mapping[Key, Task], waiting: Mapping[Key, Sequence[DrivenRun]]
    ) -> Iterator[None]:
        """A unit that failed is missing in every run that has it."""
        try:
            yield
        except UnitsFailed as error:
            failed = error.failures
        else:
            return
        for key, task in first.items():
            if task.name not in failed:
                continue
            for driven in (task.driven, *waiting[key]):
                failure = Failure(stage.name, task.unit.name, failed[task.name].error)
                self.outcome.failures.setdefault(driven.label, failure)
                if driven is not task.driven:
                    attempt = failed[task.name].attempts
                    values = {"attempt": attempt, "error": failure.error, "will_retry": False}
                    driven.log.write("unit_failed", stage=stage.name, unit=task.unit.name, **values)
                self._console.print(
                    f"[red]{escape(driven.label)} is set aside: {escape(str(failure))}", highlight=False
                )
        self.live = [driven for driven in self.live if driven.label not in self.outcome.failures]


def _key(unit: StageUnit) -> Key:
    return (unit.name, unit.fingerprint)
