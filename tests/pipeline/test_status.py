"""`status` on runs that were never driven, are at work, were killed, failed, are damaged, are finished."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config.loading import parse_config
from pipeline.event_log import EventLog
from pipeline.run_state import read_status
from pipeline.status import show_status
from storage.cache import fingerprint
from storage.run_directory import RunDirectory
from tests.errors import raises
from tests.pipeline.small_run import Recorded, list_units, record_unit

DAMAGED = {"trajectories": "prompt-000", "selection": "selection"}
CONFIG: dict[str, Any] = {
    "model": "a model that is nowhere",
    "prompts": {"calibration": "c.txt", "num_calibration": 2, "held_out": "h.txt", "num_held_out": 1},
    "selection": {"num_samples": 2},
    "method": "s2q",
    "compare": ["rtn"],
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    config = parse_config({**CONFIG, "run": "r"}, "test").identity()
    return RunDirectory.open_or_create(tmp_path / "run", config, {})


def finish(
    run: RunDirectory, stage: str, unit: str, *, seconds: float = 2.0, listed: bool = True, **result: Any
) -> Path:
    """Folder of the unit in the cache."""
    record = record_unit(run, stage, unit, result, seconds=seconds, content=unit.encode())
    if listed:
        list_units(run, stage, unit)
    return run.path / "cache" / record.key


def log_at(run: RunDirectory, second: float, event: str, **values: Any) -> None:
    EventLog(run.location)
    line = {"time": f"2026-01-02T03:{int(second) // 60:02d}:{second % 60:06.3f}+00:00", "event": event, **values}
    with (run.logs / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def half_done(run: RunDirectory) -> None:
    """Two drivers: the first one was killed in the trajectories, the second one in the activations."""
    log_at(run, 0, "run_started")
    log_at(run, 1, "stage", stage="trajectories", total=2, pending=2)
    for index in (0, 1):
        log_at(run, 5, "unit_started", stage="trajectories", unit=f"prompt-00{index}")
    log_at(run, 15, "unit_finished", stage="trajectories", unit="prompt-000")
    log_at(run, 60, "run_started")
    log_at(run, 70, "unit_started", stage="trajectories", unit="prompt-001")
    error = "Traceback:\n  somewhere\nRuntimeError: out of memory\n\n"
    log_at(run, 75, "unit_failed", stage="trajectories", unit="prompt-001", attempt=1, error=error, will_retry=True)
    log_at(run, 76, "unit_started", stage="trajectories", unit="prompt-001")
    log_at(run, 90, "unit_finished", stage="trajectories", unit="prompt-001")
    log_at(run, 91, "unit_started", stage="selection", unit="selection")
    log_at(run, 91.5, "unit_finished", stage="selection", unit="selection")
    log_at(run, 92, "stage", stage="activations", total=2, pending=2)
    log_at(run, 93, "unit_started", stage="activations", unit="prompt-000-step-003")
    finish(run, "trajectories", "prompt-000", seconds=10)
    finish(run, "trajectories", "prompt-001", seconds=14)
    finish(run, "selection", "selection", seconds=0.5)
    list_units(run, "activations", "prompt-000-step-003", "prompt-001-step-011")


def shown(path: Path, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        show_status(path, console)
    return capture.get()


def rows(text: str) -> dict[str, list[str]]:
    cells = [line.split("  ") for line in text.splitlines() if "/" in line and line[:1].isupper()]
    return {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in cells}


def test_run_that_was_never_driven(run: RunDirectory) -> None:
    text = shown(run.path)
    assert "not started" in text
    assert "last " not in text, "nothing has happened yet"
    assert rows(text)["Distillation"][0] == "0/?"
    assert rows(text)["Evaluation"][0] == "0/6"
    assert (
        "Running it again does: trajectories 2, selection 1, activations 2, distillation ?, assembly 2, evaluation 6."
        in text
    )


def test_killed_run(run: RunDirectory) -> None:
    half_done(run)
    (run.path / "run.lock").write_text('{"host": "node-7", "pid": 4711, "started": "2026-01-02T03:01:00+00:00"}\n')
    text = shown(run.path)
    assert "its driver was killed (process 4711 on host node-7, since 2026-01-02 03:01:00 UTC (" in text
    # Two drivers: 10 s and 20 s; the first one's unfinished unit is not counted twice.
    assert rows(text)["Trajectories"] == ["2/2", "1", "24 s", "30 s"]
    assert rows(text)["Selection"] == ["1/1", "-", "0.5 s", "0.5 s"]
    assert rows(text)["Activations"][0] == "0/2"
    assert "cut off  activations: prompt-000-step-003" in text
    assert "failed" not in text.replace("Failed tries", "")  # what was retried and done is no failure
    assert "unit started  activations/prompt-000-step-003" in text


def test_failed_units(run: RunDirectory) -> None:
    half_done(run)
    for attempt in (1, 2, 3):
        log_at(
            run, 93 + attempt, "unit_failed", stage="activations", unit="prompt-000-step-003", attempt=attempt,
            error="Traceback\n  x [y]\nValueError: bad [/latents]\n", will_retry=attempt < 3,
        )  # fmt: skip
    log_at(run, 99, "unit_finished", stage="activations", unit="prompt-001-step-011")
    finish(run, "activations", "prompt-001-step-011")
    text = shown(run.path)
    assert "stopped: no driver" in text
    assert "failed  activations/prompt-000-step-003 (3 attempts): ValueError: bad [/latents]" in text
    assert rows(text)["Activations"][:2] == ["1/2", "3"]
    assert "cut off" not in text
    assert "activations 1, distillation ?" in text


def test_memory_that_was_short(run: RunDirectory) -> None:
    half_done(run)
    values = {"stage": "distillation", "unit": "s2q-segment-000"}
    assert "memory  " not in shown(run.path)
    log_at(run, 94, "unit_failed", attempt=1, error="OutOfMemory: x", will_retry=True, reason="out of memory", **values)
    assert "memory  distillation: 1 try ran out of it\n" in shown(run.path)
    for second in (96, 98):  # done again by a later driver: named once
        log_at(run, second, "unit_finished", attempt=2, lean=True, **values)
    text = " ".join(shown(run.path).split())
    assert "memory distillation: 1 try ran out of it; done with less, and more time: s2q-segment-000 " in text
    assert rows(shown(run.path))["Distillation"][1] == "1"


def test_running_run_is_not_disturbed(run: RunDirectory) -> None:
    half_done(run)
    with run.lock():
        status = read_status(run.path)
        assert f"process {os.getpid()} on host" in (status.holder or "")
        assert "at work  activations: prompt-000-step-003" in shown(run.path)
        assert "Left to do: activations 2" in shown(run.path)
        before = (run.path / "run.lock").read_bytes()
        assert json.loads(before)["pid"] == os.getpid()
    assert read_status(run.path).holder is None
    with run.lock():
        pass


def test_only_units_of_the_configuration_count(run: RunDirectory) -> None:
    half_done(run)
    finish(run, "trajectories", "prompt-007", listed=False)
    finish(run, "assembly", "quarot", listed=False)
    text = shown(run.path)
    assert rows(text)["Trajectories"][0] == "2/2"
    assert rows(text)["Assembly"][0] == "0/2"


def test_damage_is_seen(run: RunDirectory) -> None:
    half_done(run)
    folders = [run.path / "cache" / stage / fingerprint({stage: unit}) for stage, unit in DAMAGED.items()]
    next(folders[0].rglob("file")).write_bytes(b"prompt-00X")
    record = folders[1] / "record.json"
    record.write_text(record.read_text()[:-20])
    text = shown(run.path)
    assert "damaged  trajectories: prompt-000; a resume redoes them" in text
    assert "damaged  selection: selection; a resume redoes them" in text
    assert rows(text)["Trajectories"][0] == "1/2"


def test_methods_without_calibration_data(tmp_path: Path) -> None:
    config = parse_config({**CONFIG, "run": "r", "method": "rtn", "compare": ["quarot"]}, "test").identity()
    run = RunDirectory.open_or_create(tmp_path / "run", config, {})
    assert read_status(run.path).stages["activations"].total == 0
    log_at(run, 0, "run_started")
    list_units(run, "distillation", *(f"unit-{index}" for index in range(10)))
    status = read_status(run.path)
    assert (status.stages["activations"].total, status.stages["distillation"].total) == (0, 10)


def test_torn_event_log(run: RunDirectory) -> None:
    half_done(run)
    with (run.logs / "events.jsonl").open("a") as file:
        file.write('{"time": "2026-01-')
    assert "unit started" in shown(run.path)


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_is_cut_or_wrapped(run: RunDirectory, width: int) -> None:
    half_done(run)
    text = shown(run.path, width)
    assert "…" not in text
    table = [line for line in text.splitlines() if line[:1].isupper() and "/" in line]
    assert len(table) == 7
    assert max(map(len, table)) <= 80


def test_no_run(tmp_path: Path) -> None:
    with raises(ValueError, tmp_path, "config.json"):
        read_status(tmp_path)


@pytest.mark.ray
def test_finished_run(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run / "run", tmp_path / "run"))
    status = read_status(run)
    assert {name: (stage.done, stage.total) for name, stage in status.stages.items()} == {
        "trajectories": (2, 2), "selection": (1, 1), "activations": (3, 3), "distillation": (4, 4), "refinement": (0, 0),
        "assembly": (1, 1), "evaluation": (4, 4),
    }  # fmt: skip
    assert status.to_do == {}
    for stage in status.stages.values():
        assert (stage.work_s > 0) == (stage.name != "refinement")
        assert stage.running == []
    text = shown(run)
    assert "finished" in text
    assert "All units are done." in text
    Recorded(run).remove("evaluation", "s2q-prompt-000")
    assert read_status(run).to_do == {"evaluation": 1}
