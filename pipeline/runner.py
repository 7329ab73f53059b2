"""Runs what is not done yet; running again is how a run is resumed.

    units of all stages (name, fingerprint) -> those without a sound record of that fingerprint -> workers -> records

A unit is done when there is a record of its fingerprint and its files are as recorded (`pipeline.done_units`). The driver
creates the record after the worker has made the files durable; a crash costs the units in flight.

A unit begins when its inputs are done (`pipeline.schedule`), and the workers get those that are ready (`pipeline.drive`).
`pipeline.study` drives many runs at once through the same parts.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace

from rich.console import Console

from pipeline.context import Run, RunContext
from pipeline.drive import drive
from pipeline.event_log import EventLog
from pipeline.provenance import TRANSFORMERS, provenance
from pipeline.schedule import Counts, DrivenRun
from pipeline.stages.activations import Activations
from pipeline.stages.assembly import Assembly
from pipeline.stages.distillation import Distillation
from pipeline.stages.evaluation import Evaluation
from pipeline.stages.refinement import Refinement
from pipeline.stages.selection import Selection
from pipeline.stages.stage import Stage
from pipeline.stages.trajectories import Trajectories
from storage.cache import Cache
from storage.lock import using
from storage.run_directory import RunDirectory

STAGES: tuple[Stage, ...] = (
    Trajectories(),
    Selection(),
    Activations(),
    Distillation(),
    Refinement(),
    Assembly(),
    Evaluation(),
)


def open_run(context: RunContext, *, update: bool) -> Run:
    """The run's directory: new, or the existing one of the same configuration and prompts (of others with `update`).

    Raises:
        ValueError: the directory belongs to another configuration or format, or is something else.
    """
    config = context.config
    cache = context.cache_location
    made_by = {**provenance(), TRANSFORMERS: len(context.model.roles)}
    directory = RunDirectory.open_or_create(
        config.run, config.identity(), made_by, update=update, cache=cache, prompts=context.kept_prompts
    )
    return Run(context, directory, Cache(cache))


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
) -> Counts:
    """Does all of the stages that is not done yet, under the run's lock.

    Args:
        planned_bytes: of memory for one worker, by stage; for messages where memory is short.
        rehash: hash all outputs again, whatever they look like.

    Raises:
        RunLocked: another driver works on the run.
        UnitsFailed, WorkersFailed: units that could not be done; everything else is kept.
    """
    with driven_runs({"": run}) as [driven]:
        planned = replace(driven, planned_bytes=planned_bytes or {})
        counts = drive([planned], stages, console, rehash=rehash).counts
        driven.log.write("run_finished")
    return counts


@contextlib.contextmanager
def driven_runs(runs: Mapping[str, Run]) -> Iterator[list[DrivenRun]]:
    """Takes the runs, by label, under their locks, and sweeps what killed writers left.

    Raises:
        RunLocked: another driver works on one of them.
    """
    started = {"host": socket.gethostname(), "pid": os.getpid(), **provenance()}
    with contextlib.ExitStack() as locks:
        found = []
        for cache in {run.cache.location: run.cache for run in runs.values()}.values():
            locks.enter_context(using(cache.location, cache.sweep))
        for label, run in runs.items():
            locks.enter_context(run.directory.lock())
            run.directory.sweep()
            driven = DrivenRun(run, EventLog(run.directory.location), label)
            driven.log.write("run_started", **started)
            found.append(driven)
        yield found
