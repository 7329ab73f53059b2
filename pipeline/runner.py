"""Runs what is not done yet, stage by stage; running again is how a run is resumed.

    for every stage: its units (name, fingerprint) -> those without a sound record of that fingerprint -> workers -> records

A unit is done when its manifest record is there, has the unit's fingerprint, and all its outputs have the recorded size and
checksum. The driver writes the record after the worker has made the outputs durable; a crash costs the units in flight.

`pipeline.study` drives many runs at once through the same parts: `driven_runs` here, `pipeline.wave`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cluster.metrics import UnitMetrics
from cluster.units import UnitsFailed
from pipeline.context import Run, RunContext
from pipeline.event_log import EventLog
from pipeline.stages.activations import Activations
from pipeline.stages.assembly import Assembly
from pipeline.stages.distillation import Distillation
from pipeline.stages.evaluation import Evaluation
from pipeline.stages.refinement import Refinement
from pipeline.stages.selection import Selection
from pipeline.stages.stage import Stage
from pipeline.stages.trajectories import Trajectories
from pipeline.wave import DrivenRun, LazySession, Task, pending_units, run_tasks
from storage.manifest import DamagedRecord, Manifest, OutputFile, UnitRecord
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


def provenance() -> dict[str, Any]:
    """Versions and commit of this program; in a submitted job, where there is no git, the commit comes with the job."""
    packages = ("torch", "diffusers", "transformers", "ray", "zarr", "safetensors", "numpy")
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit or os.environ.get("REELQUANT_COMMIT"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def run_stages(run: Run, console: Console) -> RunSummary:
    """Does all that is not done yet, under the run's lock.

    Raises:
        RunLocked: another driver works on the run.
        UnitsFailed, WorkersFailed: units that could not be done; everything else is kept.
    """
    summary, metrics = RunSummary(), None
    with driven_runs({"": run}, console) as [driven], LazySession(run.context.config) as session:
        for stage in STAGES:
            for wave in stage.waves(run):
                pending = pending_units(driven, stage, wave)
                summary.kept[stage.name] = summary.kept.get(stage.name, 0) + len(wave) - len(pending)
                summary.done[stage.name] = summary.done.get(stage.name, 0) + len(pending)
                if pending:
                    session.open()
                    metrics = metrics or UnitMetrics()
                    with _counted(metrics, stage.name) as recorded:
                        run_tasks(
                            stage,
                            [Task(driven, unit, unit.payload) for unit in pending],
                            worker=(stage.worker_class, stage.settings(run)),
                            num_done=len(wave) - len(pending),
                            console=console,
                            recorded=recorded,
                        )
        driven.log.write("run_finished")
    return summary


@contextlib.contextmanager
def _counted(metrics: UnitMetrics, stage: str) -> Iterator[Callable[[Task, UnitRecord], None]]:
    """What the units of a wave take is counted for Prometheus."""

    def recorded(task: Task, record: UnitRecord) -> None:
        metrics.finished(
            stage,
            seconds=record.seconds,
            attempt=record.attempt,
            num_bytes=sum(output.num_bytes for output in record.outputs),
            peak_memory_bytes=record.peak_memory_bytes,
        )

    try:
        yield recorded
    except UnitsFailed as error:
        metrics.set_aside(stage, len(error.failures))
        raise


@contextlib.contextmanager
def driven_runs(runs: Mapping[str, Run], console: Console) -> Iterator[list[DrivenRun]]:
    """Takes the runs, by label, under their locks: leftovers are swept, damaged units are not done any more.

    Raises:
        RunLocked: another driver works on one of them.
    """
    started = {"host": socket.gethostname(), "pid": os.getpid(), **provenance()}
    sound: set[FileState] = set()
    with contextlib.ExitStack() as locks:
        for run in runs.values():
            locks.enter_context(run.directory.lock())
        found = []
        for label, run in runs.items():
            run.directory.sweep_partial_files()
            log = EventLog(run.directory.location / LOGS)
            locks.callback(log.close)
            driven = DrivenRun(run, log, label)
            driven.log.write("run_started", **started)
            with run.directory.store.listed():
                drop_damaged(driven, console, sound)
            found.append(driven)
        yield found


FileState = tuple[Hashable, str]
"""What tells a file from any other content of it, and the checksum found: files that several runs share are hashed once."""


def drop_damaged(driven: DrivenRun, console: Console, sound: set[FileState]) -> None:
    """Checks the outputs of all done units by checksum; a unit with a lost or damaged output is not done any more.

    Args:
        sound: files that were found sound before, of any run; what is found sound now is added.
    """
    manifest = driven.run.manifest
    for stage in STAGES:
        for name in manifest.units(stage.name):
            try:
                record = manifest.read(stage.name, name)
                problems = [] if record is None else _problems(manifest, record, sound)
            except DamagedRecord as error:
                problems = [str(error)]
            if problems:
                shown = driven.full_name(f"{stage.name}/{name}")
                console.print(f"[yellow]{escape(shown)} is redone: {escape('; '.join(problems))}", highlight=False)
                driven.log.write("unit_damaged", stage=stage.name, unit=name, problems=problems)
                manifest.remove(stage.name, name)


def _problems(manifest: Manifest, record: UnitRecord, sound: set[FileState]) -> list[str]:
    if problems := manifest.missing_or_damaged(record, deep=False):
        return problems
    unseen = tuple(output for output in record.outputs if _state(manifest, output) not in sound)
    if problems := manifest.missing_or_damaged(replace(record, outputs=unseen), deep=True):
        return problems
    sound.update(_state(manifest, output) for output in unseen)
    return []


def _state(manifest: Manifest, output: OutputFile) -> FileState:
    return (manifest.stat(output).identity, output.checksum)
