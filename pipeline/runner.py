"""Runs what is not done yet; running again is how a run is resumed.

    units of all stages (name, fingerprint) -> those without a sound record of that fingerprint -> workers -> records

A unit is done when its manifest record is there, has the unit's fingerprint, and all its outputs have the recorded size and
checksum; files that look as they did when they were last hashed are not hashed again (`storage.hashed_files`). The driver
writes the record after the worker has made the outputs durable; a crash costs the units in flight.

A unit begins when its inputs are done (`pipeline.schedule`), and the workers get those that are ready (`pipeline.drive`).
`pipeline.study` drives many runs at once through the same parts.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from rich.console import Console

from pipeline.context import Run, RunContext
from pipeline.drive import drive
from pipeline.event_log import EventLog
from pipeline.phase import phase
from pipeline.provenance import provenance
from pipeline.schedule import DrivenRun
from pipeline.stages.activations import Activations
from pipeline.stages.assembly import Assembly
from pipeline.stages.distillation import Distillation
from pipeline.stages.evaluation import Evaluation
from pipeline.stages.refinement import Refinement
from pipeline.stages.selection import Selection
from pipeline.stages.stage import Stage
from pipeline.stages.trajectories import Trajectories
from pipeline.terminal import say
from storage.manifest import DamagedRecord, HeldManifest, Manifest, OutputFile, UnitRecord
from storage.run_directory import LOGS, RunDirectory

STAGES: tuple[Stage, ...] = (
    Trajectories(),
    Selection(),
    Activations(),
    Distillation(),
    Refinement(),
    Assembly(),
    Evaluation(),
)


@dataclass
class RunSummary:
    """What a call of `run_stages` did."""

    done: dict[str, int] = field(default_factory=dict)
    """Units done now, by stage."""
    kept: dict[str, int] = field(default_factory=dict)
    """Units that were done before, by stage."""


def open_run(context: RunContext, *, update: bool) -> Run:
    """The run's directory: new, or the existing one of the same configuration (of another one with `update`).

    Raises:
        ValueError: the directory belongs to another configuration or format, or is something else.
    """
    directory = RunDirectory.open_or_create(context.config.run, context.config.identity(), provenance(), update=update)
    return Run(context, directory, directory.manifest)


def stages_until(last: str | None) -> tuple[Stage, ...]:
    """The stages up to `last` and with it; all for None.

    Raises:
        ValueError: there is no such stage.
    """
    names = [stage.name for stage in STAGES]
    if last is None:
        return STAGES
    if last not in names:
        raise ValueError(f"--until {last}: there is no such stage; one of {', '.join(names)}")
    return STAGES[: names.index(last) + 1]


def run_stages(
    run: Run,
    console: Console,
    *,
    stages: tuple[Stage, ...] = STAGES,
    planned_bytes: Mapping[str, int] | None = None,
    rehash: bool = False,
) -> RunSummary:
    """Does all of the stages that is not done yet, under the run's lock.

    Args:
        planned_bytes: of memory for one worker, by stage; for messages where memory is short.
        rehash: hash all outputs again, whatever they look like.

    Raises:
        RunLocked: another driver works on the run.
        UnitsFailed, WorkersFailed: units that could not be done; everything else is kept.
    """
    with driven_runs({"": run}, console, rehash=rehash) as [driven]:
        planned = replace(driven, planned_bytes=planned_bytes or {})
        counts = drive([planned], stages, console).counts
        driven.log.write("run_finished")
    return RunSummary(dict(counts.done), dict(counts.kept))


@contextlib.contextmanager
def driven_runs(runs: Mapping[str, Run], console: Console, *, rehash: bool = False) -> Iterator[list[DrivenRun]]:
    """Takes the runs, by label, under their locks: leftovers are swept, damaged units are not done any more.

    Args:
        rehash: hash all outputs again, whatever they look like.

    Raises:
        RunLocked: another driver works on one of them.
    """
    started = {"host": socket.gethostname(), "pid": os.getpid(), **provenance()}
    sound: set[FileState] = set()
    with contextlib.ExitStack() as locks:
        locks.enter_context(locked([run.directory for run in runs.values()]))
        found = []
        for label, run in runs.items():
            manifest = HeldManifest(run.directory.location)
            if rehash:
                manifest.hashed.forget()
            run = replace(run, manifest=manifest)
            run.directory.sweep_partial_files()
            log = EventLog(run.directory.location / LOGS)
            locks.callback(log.close)
            driven = DrivenRun(run, log, label)
            driven.log.write("run_started", **started)
            found.append(driven)
        with phase(console, "Checking what is done"):
            for driven in found:
                with driven.run.directory.store.listed():
                    drop_damaged(driven, console, sound)
        yield found


@contextlib.contextmanager
def locked(directories: Sequence[RunDirectory]) -> Iterator[None]:
    """Be the only driver of all of them. Of several in a bucket whose driver seems dead, all are watched at once: each takes a
    minute.

    Raises:
        RunLocked: another driver works on one of them; the others are given back.
    """
    if len(directories) == 1:  # in this thread, which then learns at once that a lease was lost
        with directories[0].lock():
            yield
        return
    locks = [directory.lock() for directory in directories]
    with contextlib.ExitStack() as held:
        with ThreadPoolExecutor(len(locks), thread_name_prefix="lock") as pool:
            entered = [pool.submit(lock.__enter__) for lock in locks]
        for lock, result in zip(locks, entered, strict=True):
            if result.exception() is None:
                held.push(lock)
        for result in entered:
            result.result()
        yield


FileState = tuple[Hashable, str]
"""What tells a file from any other content of it, and the checksum found: files that several runs share are hashed once."""


def drop_damaged(driven: DrivenRun, console: Console, sound: set[FileState]) -> None:
    """Checks the outputs of all done units by checksum; a unit with a lost or damaged output is not done any more. Files that
    look as they did when they were last hashed are sound.

    Args:
        sound: files that were found sound before, of any run; what is found sound now is added.
    """
    manifest = driven.run.manifest
    assert isinstance(manifest, HeldManifest)
    for stage in STAGES:
        for name, record in manifest.read_stage(stage.name).items():
            problems = [str(record)] if isinstance(record, DamagedRecord) else _problems(manifest, record, sound)
            if problems:
                shown = driven.full_name(f"{stage.name}/{name}")
                say(console, (f"{shown} is redone: {'; '.join(problems)}", "yellow"))
                driven.log.write("unit_damaged", stage=stage.name, unit=name, problems=problems)
                manifest.remove(stage.name, name)


def _problems(manifest: HeldManifest, record: UnitRecord, sound: set[FileState]) -> list[str]:
    if problems := manifest.missing_or_damaged(record, deep=False):
        return problems
    states = {output: _state(manifest, output) for output in record.outputs}
    unseen = tuple(o for o, state in states.items() if state not in sound and not manifest.hashed.holds(o))
    if problems := manifest.missing_or_damaged(replace(record, outputs=unseen), deep=True):
        return problems
    manifest.hashed.note(record.outputs)
    sound.update(states.values())
    return []


def _state(manifest: Manifest, output: OutputFile) -> FileState:
    return (manifest.stat(output).identity, output.checksum)
