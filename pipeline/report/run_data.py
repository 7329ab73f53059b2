"""What a report is made from: a run directory as it lies there, complete or not. Needs neither model nor prompt files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.loading import parse_config
from pipeline.config.method import parse_method
from pipeline.event_log import read_events
from pipeline.provenance import TRANSFORMERS
from pipeline.run_units import STAGES, num_units, prompt_names
from storage.cache import DamagedRecord, UnitRecord
from storage.location import Location
from storage.recorded_outputs import RecordedOutputs
from storage.run_directory import RunDirectory
from storage.run_prompts import Prompts


@dataclass(frozen=True)
class StageUnits:
    """A stage's records and how many there will be."""

    records: tuple[UnitRecord, ...]
    """Of units that the driver has listed, in its order."""
    num_expected: int | None
    """None while it cannot be known: an earlier stage decides it."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.num_expected is not None and len(self.records) >= self.num_expected


@dataclass(frozen=True)
class Beside:
    """What stands beside a prompt in its file, and tells two of one text apart."""

    image: str = ""
    """Path from the file's folder; '' without one."""
    negative_prompt: str = ""

    def __str__(self) -> str:
        named = (("image", self.image), ("negative prompt", self.negative_prompt and f"“{self.negative_prompt}”"))
        return ", ".join(f"{name} {value}" for name, value in named if value)


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
    outputs: RecordedOutputs
    """The units' arrays and films."""
    prompts: Prompts
    """Empty for a run that began before they were kept."""

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

    def beside(self, key: str, prompt: str) -> Beside:
        """What stands beside a prompt, by key of `prompts` and the name of its unit."""
        kept = self.prompts.get(key)
        named = {} if kept is None else dict(zip(prompt_names(len(kept.prompts)), kept.prompts, strict=True))
        found = named.get(prompt)
        return Beside() if found is None else Beside(found.image_file or "", found.content.get("negative_prompt", ""))

    def record(self, stage: str, unit: str) -> UnitRecord | None:
        """One record, if the unit is done."""
        return next((r for r in self.stages[stage].records if r.unit == unit), None)


def read_run(location: Location) -> RunData:
    """Reads `config.json`, `units.json`, the records and the event log of a run.

    Raises:
        ValueError: no run there, or one of a newer format.
    """
    directory = RunDirectory.open(location)
    listed, events = directory.units(), tuple(read_events(directory.location))
    config = parse_config({**directory.config, "run": str(location)}, f"{location}/config.json")
    totals = num_units(config, num_roles=directory.provenance.get(TRANSFORMERS, 1))
    found: dict[tuple[str, str], UnitRecord] = {}
    problems: list[str] = []
    for key, record in directory.records(*STAGES).items():
        if isinstance(record, DamagedRecord):
            problems.append(str(record))
        else:
            found[key] = record
    stages = {}
    for stage in STAGES:
        records = (found.get((stage, unit.name)) for unit in listed.get(stage, ()))
        num = len(listed[stage]) if stage in listed else totals[stage]
        stages[stage] = StageUnits(tuple(r for r in records if r is not None), num)
    return RunData(
        directory.location,
        directory.config,
        directory.provenance,
        stages,
        events,
        tuple(problems),
        directory.outputs(found),
        directory.prompts,
    )


def methods_of(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The method's configuration, then those it is compared with."""
    return (config["method"], *config["compare"])


def reads_activations(method: Mapping[str, Any]) -> bool:
    """Whether the distillation of a configured method reads calibration data."""
    return parse_method(method).needs_activations
