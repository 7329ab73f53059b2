"""Hands the pending units of a wave to the workers and keeps book: manifest, event log, display. One run or many at once."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from cluster.actor_pool import PoolEvents, Unit, UnitFailure, UnitsFailed, run_units
from cluster.session import SessionSettings, ray_session
from pipeline.config.schema import RunConfig
from pipeline.context import Run
from pipeline.event_log import EventLog
from pipeline.progress import StageProgress
from pipeline.stages.stage import Stage, StageUnit
from storage.manifest import UnitRecord
from workers.messages import UnitOutput


@dataclass(frozen=True)
class DrivenRun:
    """A run under this driver's lock."""

    run: Run
    log: EventLog
    label: str = ""
    """Stands in front of its units' names where several runs are driven at once."""

    def full_name(self, unit: str) -> str:
        """Of a unit, in the pool and for people."""
        return f"{self.label}/{unit}" if self.label else unit


@dataclass(frozen=True)
class Task:
    """One unit of a run, to be done now."""

    driven: DrivenRun
    unit: StageUnit
    payload: Any
    """What the worker gets."""

    @property
    def name(self) -> str:
        """Unique in a wave."""
        return self.driven.full_name(self.unit.name)

    @property
    def affinity(self) -> str:
        """What one worker should do in a row: units of one run, and in it those that read the same model."""
        return self.driven.full_name(self.unit.affinity)


class LazySession:
    """Starts Ray when the first unit is to be done, not before."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._stack = contextlib.ExitStack()
        self._opened = False

    def __enter__(self) -> LazySession:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self) -> None:
        if not self._opened:
            self._stack.enter_context(ray_session(SessionSettings(address=self._config.cluster.address)))
            self._opened = True


def pending_units(driven: DrivenRun, stage: Stage, wave: Sequence[StageUnit]) -> list[StageUnit]:
    """Those of a wave that are not done; written into the event log."""
    pending = [unit for unit in wave if done_record(driven.run, stage.name, unit) is None]
    driven.log.write("stage", stage=stage.name, total=len(wave), pending=len(pending))
    return pending


def done_record(run: Run, stage: str, unit: StageUnit) -> UnitRecord | None:
    """The record of a unit that is done."""
    record = run.manifest.read(stage, unit.name)
    return record if record is not None and record.fingerprint == unit.fingerprint else None


class _Recorder(PoolEvents):
    """Writes the manifest, the event log and the progress display as units come and go."""

    def __init__(
        self,
        stage: Stage,
        tasks: Sequence[Task],
        display: StageProgress,
        recorded: Callable[[Task, UnitRecord], None] | None,
    ) -> None:
        self._stage, self._display, self._recorded = stage.name, display, recorded
        self._tasks = {task.name: task for task in tasks}
        self._workers: dict[str, str] = {}
        self.refused: dict[str, UnitFailure] = {}
        """Units whose worker was content, but whose result no record can hold, such as NaN."""

    def started(self, name: str, worker: str) -> None:
        self._workers[name] = worker
        self._display.started(name)
        self._log(name, "unit_started", worker=worker)

    def progress(self, name: str, done: int, total: int) -> None:
        self._display.advanced(name, done, total)

    def finished(self, name: str, result: Any, seconds: float, attempt: int) -> None:
        output: UnitOutput = result
        task = self._tasks[name]
        record = UnitRecord(
            stage=self._stage,
            unit=task.unit.name,
            fingerprint=task.unit.fingerprint,
            outputs=output.outputs,
            result=dict(output.result),
            seconds=round(seconds, 3),
            host=socket.gethostname(),
            device=output.device,
            peak_memory_bytes=output.peak_memory_bytes,
            attempt=attempt,
            worker=self._workers[name],
        )
        try:
            task.driven.run.manifest.write(record)
        except ValueError as error:
            self.refused[name] = UnitFailure(attempt, str(error))
            self.failed(name, attempt, str(error), will_retry=False)
            return
        self._log(name, "unit_finished", seconds=round(seconds, 3), attempt=attempt)
        self._display.finished(name, seconds)
        if self._recorded is not None:
            self._recorded(task, record)

    def failed(self, name: str, attempt: int, error: str, will_retry: bool) -> None:
        self._log(name, "unit_failed", attempt=attempt, error=error, will_retry=will_retry)
        self._display.failed(name, attempt, error, will_retry)

    def _log(self, name: str, event: str, **values: Any) -> None:
        task = self._tasks[name]
        task.driven.log.write(event, stage=self._stage, unit=task.unit.name, **values)


def run_tasks(
    stage: Stage,
    tasks: Sequence[Task],
    *,
    worker: tuple[type[Any], Any],
    num_done: int,
    console: Console,
    recorded: Callable[[Task, UnitRecord], None] | None = None,
) -> None:
    """Does the tasks of one wave in the open session and records them.

    Args:
        worker: class and settings of all workers.
        num_done: units of the wave that are done already, for the display.
        recorded: called with every task that is done and recorded.

    Raises:
        UnitsFailed: by task name, after all other tasks are finished.
        WorkersFailed: no worker could be started.
    """
    config = tasks[0].driven.run.context.config
    num_ranks = config.workers.num_ranks if all(task.unit.shared for task in tasks) else None
    with StageProgress(console, stage.title, total=num_done + len(tasks), done=num_done) as display:
        recorder = _Recorder(stage, tasks, display, recorded)
        failures: dict[str, UnitFailure] = {}
        try:
            results = run_units(
                *worker,
                [Unit(task.name, task.payload, task.affinity) for task in tasks],
                num_workers=max(1, num_workers(config, os.cpu_count() or 1, _num_gpus()) // (num_ranks or 1)),
                num_cpus=config.numerics.threads,
                num_gpus=config.workers.num_gpus,
                num_ranks=num_ranks,
                max_attempts=config.workers.max_attempts,
                stall_timeout_s=config.workers.stall_timeout_s,
                keep_workers=True,
                events=recorder,
            )
        except UnitsFailed as error:
            failures, results = error.failures, error.results
    failures = {**failures, **recorder.refused}
    if failures:
        raise UnitsFailed(failures, {name: result for name, result in results.items() if name not in failures})


def num_workers(config: RunConfig, cpus: int, gpus: int) -> int:
    """Worker processes of a stage on this machine, for `workers.num_workers: auto`; a replica takes several of them."""
    if config.workers.num_workers != "auto":
        return config.workers.num_workers
    if config.workers.num_gpus > 0:
        return max(1, int(gpus / config.workers.num_gpus))
    return max(1, cpus // config.numerics.threads)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
