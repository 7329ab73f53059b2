"""Hands units to the workers as they become ready and keeps book: records, event log, display, metrics. One run or many."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from cluster.actor_pool import PoolEvents, Unit, UnitFailure, UnitsFailed, run_units
from cluster.metrics import UnitMetrics
from cluster.session import SessionSettings, active_session, ray_session
from pipeline.config.schema import RunConfig
from pipeline.context import Run
from pipeline.done_units import DoneUnits
from pipeline.event_log import OUT_OF_MEMORY
from pipeline.progress import RunProgress
from pipeline.schedule import DrivenRun, Schedule, Task
from pipeline.stages.stage import Stage
from pipeline.terminal import say
from storage.cache import UnitRecord
from workers.messages import UnitOutput
from workers.shared_worker import SharedUnit, SharedWorker

MOST_ON_A_CLUSTER = 256
"""Worker processes at once where nobody says how many."""

SetAside = Callable[[Task, Sequence[DrivenRun], UnitFailure], None]
"""Called with a task that is given up, the runs that it is missing in, and why."""


def drive(
    runs: Sequence[DrivenRun],
    stages: Sequence[Stage],
    console: Console,
    *,
    rehash: bool = False,
    set_aside: SetAside | None = None,
) -> Schedule:
    """Does all units of the runs that are not done; Ray is started with the first of them. Returns the schedule at its end.

    Args:
        runs: of one configuration of workers and cluster.
        stages: in order.
        console: for the display.
        rehash: hash all files of what is done again, whatever they look like.
        set_aside: takes the units that are given up, which raise nothing then.

    Raises:
        UnitsFailed: without `set_aside`, after all units are finished that do not depend on those that failed.
        WorkersFailed: no worker could be started, or none had a place.
    """
    config = runs[0].run.context.config
    logs = {driven.run.directory.location: driven for driven in runs}

    def damaged(run: Run, stage: str, unit: str, problems: list[str]) -> None:
        driven = logs[run.directory.location]
        say(console, (f"{driven.full_name(f'{stage}/{unit}')} is redone: {'; '.join(problems)}", "yellow"))
        driven.log.write("unit_damaged", stage=stage, unit=unit, problems=problems)

    done = DoneUnits(damaged, rehash=rehash)
    with RunProgress(console) as display:
        schedule = Schedule(runs, stages, done, planned=display.planned, settled=display.settled)
        with contextlib.ExitStack() as listed:
            for place in {id(p): p for d in runs for p in (d.run.cache.place, d.run.directory.place)}.values():
                listed.enter_context(place.listed())
            tasks = schedule.take_ready()
        if tasks:
            with ray_session(SessionSettings(address=config.cluster.address)):
                _do_tasks(schedule, tasks, config, _Recorder(schedule, display, set_aside))
    return schedule


def _do_tasks(schedule: Schedule, tasks: Sequence[Task], config: RunConfig, recorder: _Recorder) -> None:
    """Does the tasks, and those that the schedule has ready later, in the open session."""
    recorder.metrics = UnitMetrics()
    num_ranks, num_processes = config.workers.num_ranks, _num_processes(config)
    failures: dict[str, UnitFailure] = {}
    try:
        results = run_units(
            SharedWorker,
            None,
            recorder.units(tasks),
            num_workers=max(1, num_processes // (num_ranks or 1)),
            num_processes=max(num_processes, num_ranks or 1),
            num_cpus=config.numerics.threads,
            num_gpus=config.workers.num_gpus,
            num_ranks=num_ranks,
            max_attempts=config.workers.max_attempts,
            stall_timeout_s=config.workers.stall_timeout_s,
            placement_timeout_s=config.workers.placement_timeout_s,
            events=recorder,
        )
    except UnitsFailed as error:
        failures, results = error.failures, error.results
    failures = {**failures, **recorder.refused}
    if failures and recorder.set_aside is None:
        raise UnitsFailed(failures, {name: result for name, result in results.items() if name not in failures})


class _Recorder(PoolEvents):
    """Writes the records, the event log and the progress display as units come and go."""

    def __init__(self, schedule: Schedule, display: RunProgress, set_aside: SetAside | None) -> None:
        self._schedule, self._display = schedule, display
        self._tasks: dict[str, Task] = {}
        self._workers: dict[str, str] = {}
        self.set_aside = set_aside
        self.metrics: UnitMetrics | None = None
        self.refused: dict[str, UnitFailure] = {}
        """Units whose worker was content, but whose result no record can hold, such as NaN."""

    def units(self, tasks: Sequence[Task]) -> list[Unit]:
        """The tasks, for the pool."""
        self._tasks.update({task.pool_name: task for task in tasks})
        return [
            Unit(
                task.pool_name,
                SharedUnit(
                    task.stage.worker_class,
                    task.settings,
                    task.unit.payload,
                    task.address,
                    name=task.pool_name,
                    planned_bytes=task.driven.planned_bytes.get(task.stage.name),
                ),
                task.affinity,
                priority=task.priority,
                prepared=hasattr(task.stage.worker_class, "prepare"),
                single=not task.unit.shared,
            )
            for task in tasks
        ]

    def waiting(self, description: str) -> None:
        self._display.waiting(description)

    def released(self) -> list[Unit]:
        return self.units(self._schedule.take_ready())

    def started(self, name: str, worker: str) -> None:
        task = self._tasks[name]
        self._workers[name] = worker
        self._display.of(task.stage).started(task.name)
        self._log(task, "unit_started", worker=worker)

    def progress(self, name: str, done: int, total: int) -> None:
        task = self._tasks[name]
        self._display.of(task.stage).advanced(task.name, done, total)

    def finished(self, name: str, result: Any, seconds: float, attempt: int) -> None:
        output: UnitOutput = result
        task = self._tasks[name]
        usage = output.usage
        if usage is not None:  # the construction of its worker is not the unit's
            seconds = usage.seconds
        record = UnitRecord(
            stage=task.stage.name,
            unit=task.unit.name,
            fingerprint=task.unit.fingerprint,
            attempt=output.attempt,
            outputs=output.outputs,
            result=dict(output.result),
            seconds=round(seconds, 3),
            host=socket.gethostname(),
            device=output.device,
            peak_memory_bytes=output.peak_memory_bytes,
            tries=attempt,
            worker=self._workers[name],
        )
        run = task.driven.run
        try:
            written, record = record, run.cache.create(record, run.directory.place)
            if record.attempt != written.attempt:  # another driver was faster
                run.cache.place.remove(f"{written.key}/{written.attempt}")
        except ValueError as error:
            self.refused[name] = UnitFailure(attempt, str(error))
            self.failed(name, attempt, str(error), will_retry=False)
            return
        told: dict[str, Any] = {} if usage is None else {"usage": asdict(usage)}
        if output.lean:
            told["lean"] = True
        self._log(task, "unit_finished", seconds=record.seconds, attempt=attempt, **told)
        self._display.of(task.stage).finished(task.name, record.seconds)
        self._count(record)
        self._schedule.finished(task, record)

    def failed(self, name: str, attempt: int, error: str, will_retry: bool, *, out_of_memory: bool = False) -> None:
        task = self._tasks[name]
        reason = {"reason": OUT_OF_MEMORY} if out_of_memory else {}
        self._log(task, "unit_failed", attempt=attempt, error=error, will_retry=will_retry, **reason)
        self._display.of(task.stage).failed(task.name, attempt, error, will_retry)
        if will_retry:
            return
        if self.metrics is not None:
            self.metrics.set_aside(task.stage.name, 1)
        missing_in = self._schedule.failed(task)
        if self.set_aside is not None:
            self.set_aside(task, missing_in, UnitFailure(attempt, error))

    def _count(self, record: UnitRecord) -> None:
        if self.metrics is not None:
            self.metrics.finished(
                record.stage,
                seconds=record.seconds,
                attempt=record.tries,
                num_bytes=sum(output.num_bytes for output in record.outputs),
                peak_memory_bytes=record.peak_memory_bytes,
            )

    def _log(self, task: Task, event: str, **values: Any) -> None:
        task.driven.log.write(event, stage=task.stage.name, unit=task.unit.name, **values)


def _num_processes(config: RunConfig) -> int:
    """Worker processes in the open session. A cluster has room that this machine knows nothing of, and its autoscaler makes
    more: `auto` is one for every unit that waits, as far as there is room."""
    if config.workers.num_workers == "auto" and not active_session().local:
        return MOST_ON_A_CLUSTER
    return num_workers(config, os.cpu_count() or 1, _num_gpus())


def num_workers(config: RunConfig, cpus: int, gpus: int) -> int:
    """Worker processes on this machine, for `workers.num_workers: auto`; a replica takes several of them."""
    if config.workers.num_workers != "auto":
        return config.workers.num_workers
    if config.workers.num_gpus > 0:
        return max(1, int(gpus / config.workers.num_gpus))
    return max(1, cpus // config.numerics.threads)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
