"""Runs what is not done yet, stage by stage; running again is how a run is resumed.

    for every stage: its units (name, fingerprint) -> those without a sound record of that fingerprint -> workers -> records

A unit is done when its manifest record is there, has the unit's fingerprint, and all its outputs have the recorded size and
checksum. The driver writes the record after the worker has made the outputs durable; a crash costs the units in flight.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.actor_pool import PoolEvents, Unit, run_units
from cluster.session import SessionSettings, ray_session
from pipeline.config.schema import RunConfig
from pipeline.context import Run, RunContext
from pipeline.event_log import EventLog
from pipeline.progress import StageProgress
from pipeline.stages.activations import Activations
from pipeline.stages.assembly import Assembly
from pipeline.stages.distillation import Distillation
from pipeline.stages.evaluation import Evaluation
from pipeline.stages.selection import Selection
from pipeline.stages.stage import Stage, StageUnit
from pipeline.stages.trajectories import Trajectories
from storage.manifest import DamagedRecord, Manifest, UnitRecord
from storage.run_directory import RunDirectory
from workers.messages import UnitOutput

STAGES: tuple[Stage, ...] = (Trajectories(), Selection(), Activations(), Distillation(), Assembly(), Evaluation())


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
    return Run(context, directory, Manifest(directory))


def provenance() -> dict[str, Any]:
    """Versions and commit of this program."""
    packages = ("torch", "diffusers", "transformers", "ray", "zarr", "safetensors", "numpy")
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit or None,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def run_stages(run: Run, console: Console) -> RunSummary:
    """Does all that is not done yet, under the run's lock.

    Raises:
        RunLocked: another driver works on the run.
        UnitsFailed, WorkersFailed: units that could not be done; everything else is kept.
    """
    summary = RunSummary()
    with run.directory.lock(), _LazySession(run.context.config) as session:
        run.directory.sweep_partial_files()
        log = EventLog(run.directory.logs)
        log.write("run_started", host=socket.gethostname(), pid=os.getpid(), **provenance())
        drop_damaged(run, console, log)
        for stage in STAGES:
            for wave in stage.waves(run):
                pending = [unit for unit in wave if not _is_done(run, stage.name, unit)]
                summary.kept[stage.name] = summary.kept.get(stage.name, 0) + len(wave) - len(pending)
                summary.done[stage.name] = summary.done.get(stage.name, 0) + len(pending)
                log.write("stage", stage=stage.name, total=len(wave), pending=len(pending))
                if pending:
                    session.open()
                    _run_wave(run, stage, wave, pending, console=console, log=log)
        log.write("run_finished")
    return summary


def drop_damaged(run: Run, console: Console, log: EventLog) -> None:
    """Checks the outputs of all done units by checksum; a unit with a lost or damaged output is not done any more."""
    for stage in STAGES:
        folder = run.manifest.root / stage.name
        for name in sorted(path.stem for path in folder.glob("*.json") if not path.name.startswith(".")):
            try:
                record = run.manifest.read(stage.name, name)
                problems = [] if record is None else run.manifest.missing_or_damaged(record, deep=True)
            except DamagedRecord as error:
                problems = [str(error)]
            if problems:
                console.print(f"[yellow]{stage.name}/{name} is redone: {'; '.join(problems)}", highlight=False)
                log.write("unit_damaged", stage=stage.name, unit=name, problems=problems)
                run.manifest.remove(stage.name, name)


def num_workers(config: RunConfig, cpus: int, gpus: int) -> int:
    """Workers of a stage on this machine, for `workers.num_workers: auto`."""
    if config.workers.num_workers != "auto":
        return config.workers.num_workers
    if config.workers.num_gpus > 0:
        return max(1, int(gpus / config.workers.num_gpus))
    return max(1, cpus // config.numerics.threads)


def _is_done(run: Run, stage: str, unit: StageUnit) -> bool:
    record = run.manifest.read(stage, unit.name)
    return record is not None and record.fingerprint == unit.fingerprint


class _LazySession:
    """Starts Ray when the first unit is to be done, not before."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._stack = contextlib.ExitStack()
        self._opened = False

    def __enter__(self) -> _LazySession:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self) -> None:
        if not self._opened:
            self._stack.enter_context(ray_session(SessionSettings(address=self._config.cluster.address)))
            self._opened = True


class _Recorder(PoolEvents):
    """Writes the manifest, the event log and the progress display as units come and go."""

    def __init__(self, run: Run, stage: Stage, units: list[StageUnit], display: StageProgress, log: EventLog) -> None:
        self._run, self._stage, self._display, self._log = run, stage.name, display, log
        self._fingerprints = {unit.name: unit.fingerprint for unit in units}
        self._workers: dict[str, str] = {}

    def started(self, name: str, worker: str) -> None:
        self._workers[name] = worker
        self._display.started(name)
        self._log.write("unit_started", stage=self._stage, unit=name, worker=worker)

    def progress(self, name: str, done: int, total: int) -> None:
        self._display.advanced(name, done, total)

    def finished(self, name: str, result: Any, seconds: float, attempt: int) -> None:
        output: UnitOutput = result
        self._run.manifest.write(
            UnitRecord(
                stage=self._stage,
                unit=name,
                fingerprint=self._fingerprints[name],
                outputs=output.outputs,
                result=dict(output.result),
                seconds=round(seconds, 3),
                host=socket.gethostname(),
                device=output.device,
                peak_memory_bytes=output.peak_memory_bytes,
                attempt=attempt,
                worker=self._workers[name],
            )
        )
        self._log.write("unit_finished", stage=self._stage, unit=name, seconds=round(seconds, 3), attempt=attempt)
        self._display.finished(name, seconds)

    def failed(self, name: str, attempt: int, error: str, will_retry: bool) -> None:
        self._log.write(
            "unit_failed", stage=self._stage, unit=name, attempt=attempt, error=error, will_retry=will_retry
        )
        self._display.failed(name, attempt, error, will_retry)


def _run_wave(
    run: Run, stage: Stage, wave: list[StageUnit], pending: list[StageUnit], *, console: Console, log: EventLog
) -> None:
    config = run.context.config
    with _display(console, stage, wave, pending) as display:
        run_units(
            stage.worker_class,
            stage.settings(run),
            [Unit(unit.name, unit.payload) for unit in pending],
            num_workers=num_workers(config, os.cpu_count() or 1, _num_gpus()),
            num_cpus=config.numerics.threads,
            num_gpus=config.workers.num_gpus,
            max_attempts=config.workers.max_attempts,
            stall_timeout_s=config.workers.stall_timeout_s,
            keep_workers=True,
            events=_Recorder(run, stage, pending, display, log),
        )


@contextlib.contextmanager
def _display(
    console: Console, stage: Stage, wave: list[StageUnit], pending: list[StageUnit]
) -> Iterator[StageProgress]:
    with StageProgress(console, stage.title, total=len(wave), done=len(wave) - len(pending)) as display:
        yield display


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
