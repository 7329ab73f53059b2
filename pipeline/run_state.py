"""Reads the state of a run from its directory alone: no configuration file, no model, and it may be at work meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cluster.units import headline
from pipeline.config.loading import parse_config
from pipeline.event_log import OUT_OF_MEMORY, read_events
from pipeline.provenance import TRANSFORMERS
from pipeline.run_units import STAGES, num_units
from storage.cache import DamagedRecord, UnitRecord
from storage.location import Location
from storage.lock import driver_of
from storage.run_directory import RunDirectory


@dataclass
class StageStatus:
    """One stage of a run."""

    name: str
    done: int = 0
    """Units with a record and undamaged outputs (files up to 64 KiB are hashed, larger ones by size)."""
    total: int | None = None
    """None while it is not known."""
    damaged: list[str] = field(default_factory=list)
    """Units whose record or outputs are lost or damaged."""
    running: list[str] = field(default_factory=list)
    """Units handed out by the last driver and not finished."""
    retries: int = 0
    """Failed attempts at units, those that were done later too."""
    out_of_memory: int = 0
    """Those of them that ran out of memory."""
    lean: list[str] = field(default_factory=list)
    """Units that were done with less memory than usual, and more time, because memory was short."""
    work_s: float = 0.0
    """Seconds in all done units."""
    wall_s: float = 0.0
    """Seconds from the first unit handed out to the last one finished, drivers added up."""


@dataclass
class RunStatus:
    """A run."""

    location: Location
    stages: dict[str, StageStatus]
    holder: str | None
    """Who drives it now."""
    died: str | None
    """Who drove it and ended without a word."""
    last_event: Mapping[str, Any] | None
    failures: dict[tuple[str, str], tuple[int, str]]
    """Attempts, and the last error in one line, of units that failed and are not done."""
    model: str | None = None
    """A model of the Hub with its commit; None for a folder."""

    @property
    def to_do(self) -> dict[str, int | None]:
        """Units that a resume would do by stage, None for an unknown number; stages that are done are left out."""
        left = {name: None if s.total is None else max(0, s.total - s.done) for name, s in self.stages.items()}
        return {name: num for name, num in left.items() if num != 0}


def read_status(location: Location) -> RunStatus:
    """The status of the run at `location`; changes nothing.

    Raises:
        ValueError: no run there, or one of a newer program.
    """
    directory = RunDirectory.open(location)
    config = parse_config({**directory.config, "run": str(location)}, f"{location}/config.json")
    events, listed = list(read_events(directory.location)), directory.units()
    totals = num_units(config, num_roles=directory.provenance.get(TRANSFORMERS, 1))
    driver = driver_of(directory.location)
    stages = {name: StageStatus(name, total=len(listed[name]) if name in listed else totals[name]) for name in STAGES}
    records = _read_records(directory, stages)
    for name, stage in stages.items():
        stage.done = len(records[name])
        stage.work_s = sum(record.seconds for record in records[name].values())
    _read_timeline(stages, events, records)
    failures = {
        (e["stage"], e["unit"]): (e["attempt"], headline(e["error"]))
        for e in events
        if e["event"] == "unit_failed" and e["unit"] not in records.get(e["stage"], {})
    }
    return RunStatus(directory.location, stages, driver.at_work, driver.died, _last(events), failures, config.hub_model)


def _last(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The last event that something happened at: how many units a stage has is none."""
    told = [event for event in events if event["event"] != "stage"]
    return told[-1] if told else None


def _read_records(directory: RunDirectory, stages: Mapping[str, StageStatus]) -> dict[str, dict[str, UnitRecord]]:
    cache, place = directory.cache, directory.place
    records: dict[str, dict[str, UnitRecord]] = {name: {} for name in stages}
    with cache.place.listed(), place.listed():
        for (stage, unit), record in directory.records(*stages).items():
            if isinstance(record, DamagedRecord) or cache.problems(record, place, deep=False):
                stages[stage].damaged.append(unit)
            else:
                records[stage][unit] = record
    return records


def _read_timeline(
    stages: Mapping[str, StageStatus],
    events: Iterable[Mapping[str, Any]],
    records: Mapping[str, Mapping[str, UnitRecord]],
) -> None:
    begun: dict[str, datetime] = {}
    ended: dict[str, datetime] = {}

    def close() -> None:
        for name, start in begun.items():
            stages[name].wall_s += (ended.get(name, start) - start).total_seconds()
            stages[name].running = []
        begun.clear()
        ended.clear()

    for event in events:
        if event["event"] == "run_started":
            close()
        stage = stages.get(event.get("stage", ""))
        if stage is None or "unit" not in event:
            continue
        time = datetime.fromisoformat(event["time"])
        begun.setdefault(stage.name, time)
        ended[stage.name] = time
        if event["event"] == "unit_started":
            stage.running.append(event["unit"])
        elif event["event"] in ("unit_finished", "unit_failed"):
            stage.running = [unit for unit in stage.running if unit != event["unit"]]
            stage.retries += event["event"] == "unit_failed"
            stage.out_of_memory += event.get("reason") == OUT_OF_MEMORY
            if event.get("lean") and event["unit"] not in stage.lean:
                stage.lean.append(event["unit"])
    running = {name: stage.running for name, stage in stages.items()}
    close()
    for name, units in running.items():
        stages[name].running = [unit for unit in units if unit not in records[name]]
