"""What the driver itself costs a unit: units of a worker that does nothing, in a Ray session of this machine.

    python -m benchmarks.driver_overhead --output benchmarks/results/driver_overhead.json

- ``pool``: `cluster.actor_pool.run_units` alone,
- ``run``: `pipeline.drive` on top, with a durable record, two lines in the event log and the progress display a unit,
  and a last unit that waits for all of them.

The figure to hold is at most 10 ms a unit. Time is from the first unit finished to the last, over the units between; the
start of Ray and of the workers is not in it.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness import ROOT, environment, parser, write_record
from cluster.actor_pool import PoolEvents, Unit, run_units
from cluster.session import SessionSettings, ray_session
from pipeline.config.loading import load_config
from pipeline.context import Run, build_context
from pipeline.drive import drive
from pipeline.event_log import read_events
from pipeline.runner import driven_runs, open_run
from pipeline.stages.stage import StageUnit, UnitPlan, require_all
from storage.cache import fingerprint
from storage.unit_store import UnitStore
from workers.messages import UnitOutput


class IdleWorker:
    """Does nothing."""

    def __init__(self, settings: None) -> None:
        pass

    def run(self, payload: int, progress: Callable[[int, int], None], store: UnitStore | None = None) -> UnitOutput:
        """No work and no files."""
        return UnitOutput({"index": payload}, "none", 0)


class IdleStage:
    """Units that do nothing."""

    name, title = "idle", "Idle"
    worker_class = IdleWorker

    def __init__(self, num_units: int) -> None:
        self._num_units = num_units

    def settings(self, run: Run) -> None:
        """None."""

    def plan(self, run: Run) -> list[UnitPlan]:
        """They depend on nothing."""
        return [
            UnitPlan(name, partial(StageUnit, name, index, fingerprint({"unit": name})))
            for index, name in enumerate(unit_names(self._num_units))
        ]


class GatheringStage(IdleStage):
    """One unit that waits for all of the idle stage, as the selection does for the trajectories."""

    name, title = "gathering", "Gathering"

    def plan(self, run: Run) -> list[UnitPlan]:
        """It depends on all."""
        return [UnitPlan("all", partial(self._unit, run))]

    def _unit(self, run: Run) -> StageUnit:
        records = require_all(run, IdleStage.name, unit_names(self._num_units))
        return StageUnit("all", 0, fingerprint({"units": [record.fingerprint for record in records]}))


def unit_names(num_units: int) -> list[str]:
    """Of the idle stage."""
    return [f"unit-{index:04d}" for index in range(num_units)]


class Clock(PoolEvents):
    """When each unit was finished."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def finished(self, name: str, result: Any, seconds: float, attempt: int) -> None:
        """Takes the time."""
        self.times.append(time.perf_counter())


def measure_pool(num_units: int, num_workers: int) -> list[float]:
    """Times of the units."""
    clock = Clock()
    units = [Unit(name, index) for index, name in enumerate(unit_names(num_units))]
    with ray_session(SessionSettings(address="local")):
        run_units(IdleWorker, None, units, num_workers=num_workers, stall_timeout_s=60.0, events=clock)
    return clock.times


def measure_run(num_units: int, num_workers: int) -> list[float]:
    """Times of the units, from the event log."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run={folder}/run", f"workers.num_workers={num_workers}", "cluster.address=local"]
        run = open_run(build_context(load_config(ROOT / "configs" / "demo.yaml", overrides)), update=False)
        with driven_runs({"": run}) as runs:
            drive(runs, (IdleStage(num_units), GatheringStage(num_units)), Console(file=io.StringIO()))
        events = list(read_events(run.directory.location))
    ends = [event["time"] for event in events if event["event"] == "unit_finished" and event["stage"] == IdleStage.name]
    return [datetime.fromisoformat(time).timestamp() for time in ends]


def summary(times: Sequence[float]) -> dict[str, float]:
    """Milliseconds a unit: mean over all, and the longest wait between two."""
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return {"ms_per_unit": 1e3 * (times[-1] - times[0]) / len(gaps), "longest_gap_ms": 1e3 * max(gaps)}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__)
    given.add_argument("--units", type=int, default=1000)
    given.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    given.add_argument("--repeats", type=int, default=3)
    options = given.parse_args(arguments)
    if options.units < 2 or min(options.workers) < 1 or options.repeats < 1:
        given.error("--units must be at least 2, --workers and --repeats at least 1")
    rows, load = [], os.getloadavg()[0]
    for num_workers in options.workers:
        for kind, measure in (("pool", measure_pool), ("run", measure_run)):
            found = [summary(measure(options.units, num_workers)) for _ in range(options.repeats)]
            median = statistics.median(row["ms_per_unit"] for row in found)
            rows.append({"kind": kind, "num_workers": num_workers, "median_ms_per_unit": median, "all": found})
            print(f"{kind}, {num_workers} workers: {median:.2f} ms a unit")
    where = environment(torch.device("cpu")) | {"cpus": os.cpu_count(), "load_before": load}
    write_record(options.output, where, {"units": options.units, "repeats": options.repeats}, results=rows)


if __name__ == "__main__":
    # By its name: classes of `__main__` would travel by value with every unit, those of the stages do not.
    from benchmarks.driver_overhead import main as named_main

    named_main()
