"""A whole run of the small model, cut to what a test needs, and ways to start one: here, or in a process of its own."""

import contextlib
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.report.page import write_report_at
from storage.cache import DamagedRecord, UnitRecord, fingerprint
from storage.recorded_outputs import RecordedOutputs
from storage.run_directory import ListedUnit, RunDirectory
from storage.unit_store import UnitAddress, UnitStore

ROOT = Path(__file__).resolve().parents[2]


def small_run(folder: Path, **changes: Any) -> Path:
    """Writes a configuration of a run in `folder` that takes under a minute, and returns its file."""
    (folder / "calibration.txt").write_text("the digit 3 moving left\nthe digit 5 moving up\n")
    (folder / "held_out.txt").write_text("the digit 7 moving right\n")
    config: dict[str, Any] = {
        "run": str(folder / "run"),
        "model": str(ROOT / "assets" / "hunyuanvideo-digits"),
        "generation": {
            "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "max_sequence_length": 32
        },
        "prompts": {
            "calibration": str(folder / "calibration.txt"), "num_calibration": 2,
            "held_out": str(folder / "held_out.txt"), "num_held_out": 1,
        },
        "selection": {"num_samples": 3, "recorded_features": ["block_input", "weight_error"]},
        "method": {"preset": "s2q", "rotation_block": 64, "epochs": 2},
        "distillation": {"segment_length": 3},
        "workers": {"num_workers": 1},  # each takes 5 s of a CPU to start
        **changes,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Recorded:
    """The records of the units that a run has listed."""

    def __init__(self, run: Path | RunDirectory) -> None:
        self.directory = run if isinstance(run, RunDirectory) else RunDirectory(run)

    def read(self, stage: str, unit: str) -> UnitRecord | None:
        found = self.directory.records(stage).get((stage, unit))
        assert not isinstance(found, DamagedRecord)
        return found

    def records(self, stage: str) -> list[UnitRecord]:
        """By name."""
        found = sorted(self.directory.records(stage).items())
        return [record for _, record in found if isinstance(record, UnitRecord)]

    def units(self, stage: str) -> list[str]:
        return [record.unit for record in self.records(stage)]

    def remove(self, stage: str, unit: str) -> None:
        record = self.read(stage, unit)
        assert record is not None
        self.directory.cache.remove(stage, record.fingerprint)

    @property
    def outputs(self) -> RecordedOutputs:
        """What the units have written."""
        records = (record for stage in self.directory.units() for record in self.records(stage))
        return self.directory.outputs({(record.stage, record.unit): record for record in records})

    def file(self, name: str) -> Path:
        """A file, or the folder of an array, by its logical name."""
        stage, unit, inside = name.split("/", 2)
        record = self.read(stage, unit)
        assert record is not None
        location = self.directory.cache.location
        assert isinstance(location, Path)
        return location / record.key / str(record.attempt) / inside


def list_units(run: RunDirectory, stage: str, *units: str) -> None:
    """Adds units to the run's list, as its driver does."""
    listed = {name: list(found) for name, found in run.units().items()}
    known = {unit.name for unit in listed.setdefault(stage, [])}
    listed[stage] += [
        ListedUnit(unit, fingerprint({stage: unit})) for unit in dict.fromkeys(units) if unit not in known
    ]
    run.write_units(listed)


def record_unit(
    run: RunDirectory,
    stage: str,
    unit: str,
    result: dict[str, Any],
    *,
    seconds: float = 1.0,
    content: bytes | None = None,
) -> UnitRecord:
    """Records a unit with one small file, if any."""
    of = fingerprint({stage: unit})
    with UnitStore(UnitAddress(run.cache.location, run.location, stage, unit, of)) as store:
        if content is not None:
            store.write_file(f"{stage}/{unit}/file", partial(_write, content=content))
        outputs = store.publish()
    record = UnitRecord(stage, unit, of, store.attempt, outputs, result, seconds, "h", "cpu", 1, 1, "worker-0")
    return run.cache.create(record, run.place)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def write_report_of(run: Path) -> Path:
    """Writes the report of a run, and returns its file."""
    write_report_at(run)
    return RunDirectory(run).report


def command(*arguments: str) -> list[str]:
    """The command line of `python -m pipeline`."""
    return [sys.executable, "-m", "pipeline", *arguments]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end in this process, which has imported its packages already: a new one takes 7 s of a CPU for
    that. Where it is killed, or its whole output counts, start `command`."""
    handlers = list(logging.root.handlers)
    with contextlib.chdir(ROOT):
        result = CliRunner().invoke(app, list(arguments))
    logging.root.handlers[:] = handlers
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
