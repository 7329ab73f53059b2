"""The whole job with the full-precision model over two processes: the bytes of a run in which every worker has all of it."""

import signal
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.event_log import read_events
from tests.pipeline.small_run import ROOT, Recorded, call, command, files, small_run
from tests.pipeline.test_run import wait_for, worker_processes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
WORKERS = {"num_workers": 2, "sharding": "fsdp", "gpus_per_replica": 2}


def outputs(run: Path, stage: str) -> dict[str, object]:
    """Files and checksums of every unit."""
    return {record.unit: record.outputs for record in Recorded(run).records(stage)}


def assert_same_calibration(run: Path, finished: Path) -> None:
    for stage in (
        "trajectories",
        "selection",
        "activations",
    ):  # the replica does the selection too: it would lose its place
        assert outputs(run, stage) == outputs(finished, stage)
        devices = {record.worker for record in Recorded(run).records(stage)}
        assert devices <= {"worker-0.0", "worker-0.1"}


def test_sharded_calibration_gives_the_bytes_of_an_unsharded_one(finished_run: Path, tmp_path: Path) -> None:
    done = call("run", str(small_run(tmp_path, workers=WORKERS)), "--until", "activations")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_calibration(tmp_path / "run", finished_run / "run")


@pytest.mark.slow
def test_a_sharded_run_gives_the_bytes_of_an_unsharded_one(finished_run: Path, tmp_path: Path) -> None:
    done = call("run", str(small_run(tmp_path, workers=WORKERS)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_calibration(tmp_path / "run", finished_run / "run")
    assert files(tmp_path / "run" / "checkpoint") == files(finished_run / "run" / "checkpoint")
    videos = [outputs(folder / "run", "evaluation") for folder in (tmp_path, finished_run)]
    assert videos[0] == videos[1]
    workers = {record.unit: record.worker for record in Recorded(tmp_path / "run").records("evaluation")}
    full = {"full_precision-prompt-000", "step_weights"}
    assert {unit: worker == "worker-0.0" for unit, worker in workers.items()} == {
        **dict.fromkeys(full, True), "s2q-prompt-000": False, "s2q-velocity-000": False,
    }  # fmt: skip
    again = call("run", str(small_run(tmp_path)))
    assert again.returncode == 0, "how the model was held is no part of what a run is"
    assert "0 units done now" in again.stdout


@pytest.mark.slow
def test_a_rank_killed_in_a_unit_costs_no_byte(finished_run: Path, tmp_path: Path) -> None:
    config, run = small_run(tmp_path, workers=WORKERS), tmp_path / "run"
    driver = psutil.Popen(command("run", str(config)), cwd=ROOT)
    try:
        for stage, victim in (("trajectories", 1), ("activations", 0)):
            wait_for(run, stage, lambda: driver.poll() is None)
            worker_processes(driver)[victim].send_signal(signal.SIGKILL)
        assert driver.wait(400) == 0
    finally:
        if driver.poll() is None:
            driver.kill()
    failed = [event for event in read_events(run) if event["event"] == "unit_failed"]
    assert {event["stage"] for event in failed} >= {"trajectories"}
    assert all(event["will_retry"] for event in failed)
    assert_same_calibration(run, finished_run / "run")
    assert files(run / "checkpoint") == files(finished_run / "run" / "checkpoint")


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_select_what_one_selects(tmp_path: Path) -> None:
    found = {}
    for name, workers in {"one": {"num_gpus": 1}, "two": {"num_gpus": 1, **WORKERS}}.items():
        (tmp_path / name).mkdir()
        done = call("run", str(small_run(tmp_path / name, workers=workers)), "--until", "selection")
        assert done.returncode == 0, done.stdout + done.stderr
        found[name] = Recorded(tmp_path / name / "run").records("selection")[0].result["scores"]
    assert found["one"].keys() == found["two"].keys()
    for feature, rows in found["one"].items():
        for row, expected in zip(found["two"][feature], rows, strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-3), feature
