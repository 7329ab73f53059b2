"""What a report is made from: a run directory as it lies there, complete or not. Needs neither model nor prompt files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.event_log import read_events
from storage.calibration_store import CalibrationStore
from storage.location import Location
from storage.manifest import DamagedRecord, Manifest, UnitRecord
from storage.run_directory import LOGS, RunDirectory

STAGES = ("trajectories", "selection", "activations", "distillation", "refinement", "assembly", "evaluation")
REFERENCE = "full_precision"
"""Name of the 16-bit model among the models of the evaluation."""


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
    expected = _expected_units(config, found, events)
    stages = {}
    for stage, names in expected.items():
        records = found[stage].values() if names is None else [found[stage][n] for n in names if n in found[stage]]
        stages[stage] = StageUnits(tuple(records), None if names is None else len(names))
    return RunData(directory.location, config, directory.provenance, stages, events, tuple(problems))


def methods_of(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The method's configuration, then those it is compared with."""
    return (config["method"], *config["compare"])


def reads_activations(method: Mapping[str, Any]) -> bool:
    """Whether a configured method reads calibration data (`reelquant.calibration.recipe.Recipe.needs_activations`)."""
    learned = "learned" in (method["channel_scale"], method["rotation"], method["clip"])
    return bool(learned or method["rounding"] == "gptq" or method["channel_scale"] == "smoothquant")


def _records(manifest: Manifest, stage: str, problems: list[str]) -> Iterable[UnitRecord]:
    for record in manifest.read_stage(stage).values():
        if isinstance(record, DamagedRecord):
            problems.append(str(record))
        else:
            yield record


def _expected_units(
    config: Mapping[str, Any], found: Mapping[str, Mapping[str, UnitRecord]], events: tuple[Mapping[str, Any], ...]
) -> dict[str, list[str] | None]:
    """Names of a stage's units in the pipeline's order; None where they are not known yet."""
    prompts, methods = config["prompts"], [method["name"] for method in methods_of(config)]
    held_out = [f"prompt-{index:03d}" for index in range(prompts["num_held_out"])]
    expected: dict[str, list[str] | None] = {
        "trajectories": [f"prompt-{index:03d}" for index in range(prompts["num_calibration"])],
        "selection": ["selection"],
        "activations": [],
        "distillation": None,
        "refinement": [m["name"] for m in methods_of(config) if m.get("drift_repair") or m.get("velocity_correction")],
        "assembly": methods,
        "evaluation": [f"{model}-{prompt}" for model in (REFERENCE, *methods) for prompt in held_out],
    }
    if any(reads_activations(method) or method.get("drift_repair") for method in methods_of(config)):
        selection = found["selection"].get("selection")
        chosen = selection.result.get("chosen", []) if selection else None
        expected["activations"] = None if chosen is None else [f"{c['prompt']}-step-{c['step']:03d}" for c in chosen]
    num_segments = _num_segments(found["distillation"], events, methods)
    if num_segments is not None:
        segments = [*(f"segment-{index:03d}" for index in range(num_segments)), "auxiliary"]
        expected["distillation"] = [f"{method}-{segment}" for method in methods for segment in segments]
    return expected


def _num_segments(
    records: Mapping[str, UnitRecord], events: tuple[Mapping[str, Any], ...], methods: list[str]
) -> int | None:
    """Segments per method, from what the driver last said it has to do; without a log, from the records."""
    totals = [e["total"] for e in events if e.get("event") == "stage" and e.get("stage") == "distillation"]
    if totals and totals[-1] % len(methods) == 0:
        return int(totals[-1]) // len(methods) - 1
    if events:
        return None
    found = [re.fullmatch(r".+-segment-(\d+)", name) for name in records]
    return max((int(match[1]) + 1 for match in found if match), default=None)
