"""The whole job with real Ray, Zarr and diffusers: what comes out, and that no kill, damage or worker count changes a byte."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from imageio.v3 import immeta, imread

from pipeline.event_log import read_events
from pipeline.report.timeline import Bar, read_timeline
from storage.run_directory import RunDirectory
from tests.pipeline.small_run import ROOT, Recorded, call, command, files, small_run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def copy_of(finished: Path, folder: Path) -> Path:
    """The finished run at another place; its configuration file names the new run directory."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    config = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, "run": str(folder / "run")}))
    return folder / "run.yaml"


def count(run: Path, stage: str) -> dict[str, int]:
    """How often each unit of a stage was finished, over all drivers."""
    finished = [e["unit"] for e in read_events(run) if e["event"] == "unit_finished" and e["stage"] == stage]
    return {unit: finished.count(unit) for unit in finished}


def test_everything_is_there(finished_run: Path) -> None:
    run = finished_run / "run"
    recorded = Recorded(run)
    units = {
        stage: [record.unit for record in recorded.records(stage)]
        for stage in ("trajectories", "selection", "activations", "distillation", "assembly", "evaluation")
    }
    assert {stage: len(names) for stage, names in units.items()} == {
        "trajectories": 2, "selection": 1, "activations": 3, "distillation": 4, "assembly": 1, "evaluation": 4,
    }  # fmt: skip
    result = recorded.records("assembly")[0].result
    assert result["bits"] == "W4A8"
    assert result["compression"] > 3.2
    scores = recorded.records("selection")[0].result["scores"]
    assert all(len(rows) == 2 and len(rows[0]) == 3 for rows in scores.values())
    fidelity = next(r.result for r in recorded.records("evaluation") if r.unit.startswith("s2q"))
    assert 5 < fidelity["psnr_db"] < 60
    films = sorted((run / "evaluation").glob("*.mp4"))
    assert [film.stem for film in films] == ["full_precision-prompt-000", "s2q-prompt-000"]
    assert imread(films[1], plugin="pyav").shape == (9, 32, 48, 3)
    assert immeta(films[1], plugin="pyav")["fps"] == 24
    report = (run / "report.html").read_text()
    assert "<html" in report
    assert "How busy it was" in report
    assert "Gantt chart of 15 attempts at units on 2 workers" in report


@pytest.mark.slow
def test_one_worker_gives_the_bytes_of_two(finished_run: Path, tmp_path: Path) -> None:
    done = call("run", str(small_run(tmp_path)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(tmp_path / "run" / "checkpoint") == files(finished_run / "run" / "checkpoint")


@pytest.mark.slow
def test_a_run_that_ends_after_a_stage_goes_on_from_there(finished_run: Path, tmp_path: Path) -> None:
    config, run = str(small_run(tmp_path)), tmp_path / "run"
    done = call("run", config, "--until", "activations")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 units done now, 0 were done before" in done.stdout
    assert "checkpoint:" not in done.stdout
    assert Recorded(run).units("distillation") == []
    assert "This run is not finished" in (run / "report.html").read_text()
    done = call("run", config, "--until", "assembly")
    assert "5 units done now, 6 were done before" in done.stdout, done.stdout + done.stderr
    assert f"checkpoint: {run / 'checkpoint'}" in done.stdout
    assert Recorded(run).units("evaluation") == []
    assert files(run / "checkpoint") == files(finished_run / "run" / "checkpoint")


def test_stages_overlap_where_their_inputs_allow(finished_run: Path) -> None:
    bars = read_timeline(read_events(finished_run / "run")).bars
    together = {
        (one.stage, other.stage)
        for one in bars
        for other in bars
        if one.stage < other.stage and max(one.start_s, other.start_s) < min(ends_s(one), ends_s(other))
    }
    early = {"trajectories", "selection", "activations", "distillation"}
    assert {stages for stages in together if "evaluation" in stages and early & set(stages)}, together
    assert len({bar.worker for bar in bars}) == 2


def ends_s(bar: Bar) -> float:
    return bar.start_s + bar.seconds


def wait_for_overlap(run: Path, alive: Callable[[], bool]) -> None:
    """Until units of two stages are under way."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and alive():
        under_way: set[tuple[str, str]] = set()
        for event in read_events(run):
            key = (event.get("stage", ""), event.get("unit", ""))
            (under_way.add if event["event"] == "unit_started" else under_way.discard)(key)
        if len({stage for stage, _ in under_way}) > 1:
            return
        time.sleep(0.02)
    raise AssertionError("no two stages were at work at the same time")


def wait_for(run: Path, stage: str, alive: Callable[[], bool], *, since: int = 0) -> None:
    """Until a unit of the stage is under way; the first `since` events are of earlier drivers."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and alive():
        events = list(read_events(run))[since:]
        if any(e["event"] == "unit_started" and e["stage"] == stage for e in events):
            return
        time.sleep(0.02)
    raise AssertionError(f"no unit of {stage} was started")


def worker_processes(driver: psutil.Process) -> list[psutil.Process]:
    """Ray's worker processes that hold one of our actors, below a driver."""

    def is_worker(process: psutil.Process) -> bool:
        try:
            return "UnitActor" in " ".join(process.cmdline())
        except psutil.NoSuchProcess:  # it may be a zombie
            return False

    return [process for process in driver.children(recursive=True) if is_worker(process)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_workers_and_drivers_cost_no_byte(finished_run: Path, tmp_path: Path) -> None:
    config, run = small_run(tmp_path, workers={"num_workers": 2}), tmp_path / "run"

    def start() -> psutil.Popen:
        return psutil.Popen(command("run", str(config)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill_workers(*stages: str) -> None:
        for stage in stages:
            wait_for(run, stage, lambda: driver.poll() is None, since=since)
            kill_all_workers()

    def kill_all_workers() -> None:
        for worker in worker_processes(driver):  # all of them: those that have the units are among them
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGKILL)

    def kill_driver(stage: str) -> int:
        wait_for(run, stage, lambda: driver.poll() is None, since=since)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        return len(list(read_events(run)))

    driver, since = start(), 0
    kill_workers("trajectories")
    wait_for_overlap(run, lambda: driver.poll() is None)
    kill_all_workers()
    kill_workers("activations")
    since = kill_driver("distillation")
    driver = start()
    kill_workers("distillation", "assembly")
    since = kill_driver("evaluation")
    driver = start()
    kill_workers("evaluation")
    assert driver.wait() == 0
    failed = [e["stage"] for e in read_events(run) if e["event"] == "unit_failed"]
    for stage in ("trajectories", "distillation", "evaluation"):
        assert failed.count(stage) >= 1, (stage, failed)  # the others may end before the kill comes
    for stage in ("trajectories", "selection", "activations", "distillation"):
        assert set(count(run, stage).values()) == {1}, "what was finished is not done again"
    assert files(run / "checkpoint") == files(finished_run / "run" / "checkpoint")


@pytest.mark.slow
def test_damage_is_named_and_only_the_damaged_units_are_redone(finished_run: Path, tmp_path: Path) -> None:
    config, run = copy_of(finished_run, tmp_path), tmp_path / "run"
    sample = Recorded(run).records("activations")[1].unit
    arrays = Recorded(run).file(f"activations/{sample}/temb").parent
    chunk = max((p for p in arrays.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    artifact = next((run / "cache" / "distillation").rglob("single_transformer_blocks.4*"))
    artifact.write_bytes(artifact.read_bytes()[:-7])
    before = {stage: count(run, stage) for stage in ("trajectories", "activations", "distillation", "evaluation")}
    done = call("run", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"activations/{sample} is redone" in done.stdout
    assert artifact.name in done.stdout
    redone = {
        unit for stage, old in before.items() for unit, num in count(run, stage).items() if num > old.get(unit, 0)
    }
    assert redone == {sample, "s2q-segment-002"}
    assert files(run / "checkpoint") == files(finished_run / "run" / "checkpoint")


@pytest.mark.slow
def test_a_changed_configuration_redoes_only_what_depends_on_it(finished_run: Path, tmp_path: Path) -> None:
    config, run = copy_of(finished_run, tmp_path), tmp_path / "run"
    change = ("--set", "bits.exceptions=[{pattern: transformer_blocks.0.ff.*, weight: 8, activation: 8}]")
    refused = call("run", str(config), *change)
    assert refused.returncode == 1
    assert "bits.exceptions" in refused.stdout
    assert "--update" in refused.stdout
    before = {stage: count(run, stage) for stage in ("trajectories", "activations", "distillation")}
    done = call("run", str(config), *change, "--update")
    assert done.returncode == 0, done.stdout + done.stderr
    assert count(run, "trajectories") == before["trajectories"]
    assert count(run, "activations") == before["activations"]
    changed = {u for u, num in count(run, "distillation").items() if num > before["distillation"][u]}
    assert changed == {"s2q-segment-000"}, "only the segment with the layers that the pattern names"
    spec = json.loads((run / "checkpoint" / "transformer" / "config.json").read_text())["quantization_config"]
    assert spec["layers"]["transformer_blocks.0.ff.net.2"]["weight_bits"] == 8


@pytest.mark.slow
def test_a_second_driver_is_refused_with_the_name_of_the_first(finished_run: Path, tmp_path: Path) -> None:
    config, run = copy_of(finished_run, tmp_path), tmp_path / "run"
    with RunDirectory(run).lock():
        refused = call("run", str(config))
    assert refused.returncode == 1
    assert f"process {os.getpid()}" in refused.stdout
    again = call("run", str(config))
    assert again.returncode == 0
    assert "0 units done now" in again.stdout


def test_two_runs_that_share_a_cache_share_their_units(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = copy_of(finished_run, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    other = small_run(tmp_path / "elsewhere", run=str(tmp_path / "other"), cache=str(tmp_path / "run" / "cache"))
    done = call("run", str(other))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 unit done now, 14 were done before" in done.stdout, "its checkpoint alone"
    assert files(tmp_path / "other" / "checkpoint") == files(finished_run / "run" / "checkpoint")
    assert not (tmp_path / "other" / "cache").exists()
    monkeypatch.setattr("pipeline.drive.ray_session", None)  # a finished run needs none
    done = call("run", str(finished))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 units done now, 15 were done before" in done.stdout
    assert not torch.cuda.is_initialized()
