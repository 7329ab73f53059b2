"""What a report is made from: a run directory as it lies there, complete or not. Needs neither model nor prompt files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.loading import parse_config
from pipeline.config.method import parse_method
from pipeline.event_log import read_events
from pipeline.run_units import STAGES, recorded_unit_names
from storage.calibration_store import CalibrationStore
from storage.location import Location
from storage.manifest import DamagedRecord, Manifest, UnitRecord
from storage.run_directory import LOGS, RunDirectory


@dataclass(frozen=True)
class StageUnits:
    """A stage's records and how many there will be."""

    records: tuple[UnitRecord, ...]
    """Of units that the configuration asks for; what an older configuration left behind is not among them."""
    num_expected: int | None
    """None while it cannot be known: an earlier stage decides it."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.num_expected is not None and len(self.records) >= self.num_expected


@dataclass(frozen=True)
class RunData:
    """One run, read once."""

    location: Location
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    stages: Mapping[str, StageUnits]
    events: tuple[Mapping[str, Any], ...]
    problems: tuple[str, ...]
    """Records that cannot be read, with the reason."""

    @property
    def store(self) -> CalibrationStore:
        """The run's arrays."""
        return RunDirectory(self.location).calibration_store

    @property
    def methods(self) -> tuple[Mapping[str, Any], ...]:
        """Configurations of the method and of those it is compared with."""
        return methods_of(self.config)

    @property
    def method_names(self) -> tuple[str, ...]:
        """The run's method first."""
        return tuple(method["name"] for method in self.methods)

    @property
    def setting_names(self) -> tuple[str, ...]:
        """Settings of the method's checkpoint with which it is evaluated too."""
        return tuple(self.config["evaluation"].get("settings", {}))

    def record(self, stage: str, unit: str) -> UnitRecord | None:
        """One record, if the unit is done."""
        return next((r for r in self.stages[stage].records if r.unit == unit), None)


def read_run(location: Location) -> RunData:
    """Reads `config.json`, the manifest and the event log of a run.

    Raises:
        ValueError: no run there, or one of a newer format.
    """
    directory = RunDirectory.open(location)
    config, events = directory.config, tuple(read_events(directory.location / LOGS))
    found: dict[str, dict[str, UnitRecord]] = {}
    problems: list[str] = []
    for stage in STAGES:
        found[stage] = {}
        for record in _records(directory.manifest, stage, problems):
            found[stage][record.unit] = record
    parsed = parse_config({**config, "run": str(location)}, f"{location}/config.json")
    stages = {}
    for stage, units in recorded_unit_names(parsed, found, events).items():
        of_stage = found[stage]
        records = of_stage.values() if units.names is None else [of_stage[n] for n in units.names if n in of_stage]
        stages[stage] = StageUnits(tuple(records), units.num)
    return RunData(directory.location, config, directory.provenance, stages, events, tuple(problems))


def methods_of(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The method's configuration, then those it is compared with."""
    return (config["method"], *config["compare"])


def reads_activations(method: Mapping[str, Any]) -> bool:
    """Whether the distillation of a configured method reads calibration data."""
    return parse_method(method).needs_activations


def _records(manifest: Manifest, stage: str, problems: list[str]) -> Iterable[UnitRecord]:
    for record in manifest.read_stage(stage).values():
        if isinstance(record, DamagedRecord):
            problems.append(str(record))
        else:
            yield record
