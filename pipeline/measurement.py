"""`plan --measure`: one unit of each kind (`pipeline.unit_sampler`), done by the run's workers, and the hours that follow."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cluster.actor_pool import PoolEvents, Unit, run_units
from cluster.session import SessionSettings, ray_session
from pipeline.config.loading import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.context import RunContext
from pipeline.drive import num_workers
from pipeline.planning.machine import existing_parent, is_remote
from pipeline.progress import RunProgress
from pipeline.runner import open_run
from pipeline.terminal import counted, new_table, say_sentence, say_table
from pipeline.unit_sampler import MeasuredKind, UnitSampler
from storage.location import StoreUrl
from storage.scratch import locked_folder
from workers.messages import UnitOutput
from workers.shared_worker import SharedWorker


@dataclass(frozen=True)
class Measurement:
    """What was measured, and the hours that follow."""

    kinds: tuple[MeasuredKind, ...]
    num_workers: int | None
    """Units that are done at once; None where the cluster decides it: times are then those of one worker."""
    units: Mapping[str, int]
    """Of every stage, as they are handed out: segments, not blocks."""

    def seconds(self, kind: MeasuredKind) -> float:
        """Of all units of a kind, on the configured workers."""
        return kind.num * kind.seconds / min(self.num_workers or 1, self.units[kind.stage])

    def show(self, console: Console) -> None:
        """Prints a table and what it means; fits 80 columns."""
        table = new_table("Measured", "Seconds", "Units", "All, h:mm:ss")
        for stage, kinds in groupby(self.kinds, attrgetter("stage")):
            own = list(kinds)
            num, seconds = sum(kind.num for kind in own), sum(map(self.seconds, own))
            table.add_row(stage.capitalize(), "", f"{num:,}", _clock(seconds), style="bold")
            for kind in own:
                table.add_row(f"  {kind.unit}", f"{kind.seconds:.2f}", f"{kind.num:,}", _clock(self.seconds(kind)))
        table.add_section()
        table.add_row("All", "", "", _clock(sum(map(self.seconds, self.kinds))), style="bold")
        console.line()
        say_table(console, table)
        console.line()
        loads = max(kind.output.usage.load_s for kind in self.kinds if kind.output.usage is not None)
        workers = "of one worker" if self.num_workers is None else f"shared by {counted(self.num_workers, 'worker')}"
        said = (
            f"One unit of each kind was done on {self.kinds[0].output.device}. Times are seconds times units, {workers}, "
            "one stage after the other. What a process does once, such as compiling kernels, is in the seconds; opening a "
            f"model, up to {loads:.1f} s, is not. Of the distillation a unit is one block here, with all samples and epochs."
        )
        say_sentence(console, said)


def require_measurable(config: RunConfig, *, shapes_only: bool) -> None:
    """Stops a measurement that cannot be made.

    Raises:
        ConfigError: lists all reasons.
    """
    problems = []
    if isinstance(config.run, StoreUrl):
        problems.append(f"run: {config.run} is in a bucket; plan --measure needs a folder beside it: --set run=FOLDER")
    if shapes_only:
        problems.append("--measure runs the model, whose weights --shapes-only does without: give one of them")
    if problems:
        raise ConfigError(problems)


def measure(context: RunContext, console: Console) -> Measurement:
    """Does one unit of each kind of a feasible run, whose weights are on this machine, in a scratch folder beside the run's
    directory; the folder is removed, and what a killed one has left is at the next start.

    Raises:
        UnitsFailed, WorkersFailed: as `run_stages`.
    """
    config = context.config
    assert isinstance(config.run, Path), "require_measurable comes first"
    run = config.run.absolute()
    with locked_folder(existing_parent(run), f".{run.name}-measure-") as folder:
        scratch = replace(context, config=config.model_copy(update={"run": folder / "run", "cache": None}))
        sampler = UnitSampler(open_run(scratch, update=False))
        _do(sampler, console)
    elsewhere = config.workers.num_workers == "auto" and is_remote(config)
    at_once = None if elsewhere else num_workers(config, os.cpu_count() or 1, torch.cuda.device_count())
    return Measurement(tuple(sampler.kinds.values()), at_once, sampler.counts)


def _do(sampler: UnitSampler, console: Console) -> None:
    config, steps = sampler.run.context.config, sampler.units()
    workers = config.workers
    with RunProgress(console) as display, ray_session(SessionSettings(address=config.cluster.address)):
        events = _Steps(steps, sampler, display)
        run_units(
            SharedWorker,
            None,
            events.released(),
            num_workers=1,
            num_processes=max(1, workers.num_ranks or 1),
            num_cpus=config.numerics.threads,
            num_gpus=workers.num_gpus,
            num_ranks=workers.num_ranks,
            max_attempts=workers.max_attempts,
            stall_timeout_s=workers.stall_timeout_s,
            placement_timeout_s=workers.placement_timeout_s,
            events=events,
        )


class _Steps(PoolEvents):
    """Hands out one unit after the other, each when the one before is done."""

    def __init__(self, steps: Generator[Unit, UnitOutput], sampler: UnitSampler, display: RunProgress) -> None:
        self._steps, self._sampler, self._display = steps, sampler, display
        self._next: Unit | None = next(steps)

    def released(self) -> Sequence[Unit]:
        unit, self._next = self._next, None
        if unit is None:
            return ()
        self._display.planned(self._sampler.stage, [_short(unit.name)])
        return (unit,)

    def waiting(self, description: str) -> None:
        self._display.waiting(description)

    def started(self, name: str, worker: str) -> None:
        self._display.of(self._sampler.stage).started(_short(name))

    def progress(self, name: str, done: int, total: int) -> None:
        self._display.of(self._sampler.stage).advanced(_short(name), done, total)

    def failed(self, name: str, attempt: int, error: str, will_retry: bool, *, out_of_memory: bool = False) -> None:
        self._display.of(self._sampler.stage).failed(_short(name), attempt, error, will_retry)

    def finished(self, name: str, result: Any, seconds: float, attempt: int) -> None:
        output: UnitOutput = result
        self._display.of(self._sampler.stage).finished(_short(name), output.usage.seconds if output.usage else seconds)
        try:
            self._next = self._steps.send(output)
        except StopIteration:
            self._next = None


def _short(name: str) -> str:
    return name.partition("/")[2]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
