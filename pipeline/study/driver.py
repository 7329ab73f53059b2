"""Drives all runs of a study in one pool of workers; what several runs have in common is done once (`pipeline.schedule`).

A run whose unit fails for good is set aside: what depends on that unit is not done. The others go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from cluster.units import UnitFailure, headline
from pipeline.context import Run
from pipeline.drive import drive
from pipeline.provenance import provenance
from pipeline.runner import STAGES, driven_runs, open_run
from pipeline.schedule import Counts, DrivenRun, Task
from pipeline.stages.stage import Stage
from pipeline.study.expansion import STUDY_FILE
from pipeline.study.preparation import PreparedStudy, directory_problems
from pipeline.terminal import say
from storage.atomic_files import create_directory, json_bytes
from storage.run_directory import RunConfigMismatch, RunDirectory

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Failure:
    """Why a run was set aside."""

    stage: str
    unit: str
    error: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.unit}: {headline(self.error)}"


@dataclass
class StudyOutcome:
    """What a call of `run_study` did."""

    runs: Mapping[str, Run]
    """By label, those set aside too, with the records of what is done."""
    counts: Counts = field(default_factory=Counts)
    """Units done, shared and kept."""
    failures: dict[str, Failure] = field(default_factory=dict)
    """By label, the first of each run."""


def run_study(
    prepared: PreparedStudy, console: Console, *, update: bool = False, stages: tuple[Stage, ...] = STAGES
) -> StudyOutcome:
    """Does all of the stages that is not done yet, under the locks of the study and of all its runs.

    Raises:
        ValueError: the study's directory is something else, or one of its runs has another configuration.
        RunLocked: another driver works on the study or on one of its runs.
        WorkersFailed: no worker could be started; everything done is kept.
    """
    directory = RunDirectory(prepared.study.location)
    _open_directory(directory)
    with directory.lock():
        document = {"format_version": FORMAT_VERSION, "study": prepared.study.written.model_dump(mode="json")}
        directory.place.put(STUDY_FILE, json_bytes({**document, "provenance": provenance()}))
        runs = _open_runs(prepared, update=update)
        outcome = StudyOutcome(runs)
        with driven_runs(runs) as driven:
            schedule = drive(driven, stages, console, set_aside=_SetAside(console, outcome.failures))
            for run in driven:
                if run.label not in outcome.failures:
                    run.log.write("run_finished")
            outcome.counts = schedule.counts
    return outcome


def _open_directory(directory: RunDirectory) -> None:
    if problems := directory_problems(directory):
        raise ValueError(problems[0])
    place = directory.location
    if isinstance(place, Path):
        create_directory(place)


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


class _SetAside:
    """A unit that failed is missing in every run that has it."""

    def __init__(self, console: Console, failures: dict[str, Failure]) -> None:
        self._console, self._failures = console, failures

    def __call__(self, task: Task, missing_in: Sequence[DrivenRun], failed: UnitFailure) -> None:
        failure = Failure(task.stage.name, task.unit.name, failed.error)
        for driven in missing_in:
            self._failures.setdefault(driven.label, failure)
            if driven is not task.driven:
                values = {"attempt": failed.attempts, "error": failed.error, "will_retry": False}
                driven.log.write("unit_failed", stage=failure.stage, unit=failure.unit, **values)
            say(self._console, (f"{driven.label} is set aside: {failure}", "red"))
