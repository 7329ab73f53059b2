"""Faults of what a run stands on: the head, the disk, the clocks. After each the same command gives the same bytes."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from pipeline.event_log import read_events
from tests.cluster.ray_head import RayHead, ray_head
from tests.needs import need_program
from tests.pipeline.small_run import ROOT, Recorded, call, command, files
from tests.pipeline.test_run import copy_of, count, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """A cluster whose processes wait 5 s for a lost control service instead of 60 s."""
    with ray_head(RAY_gcs_rpc_server_reconnect_timeout_s="5") as running:
        yield running


def half_of(finished: Path, folder: Path) -> tuple[str, Path]:
    """Configuration, for one worker, and directory of the finished run as it was before the distillation."""
    config, run = copy_of(finished, folder), folder / "run"
    config.write_text(config.read_text().replace("num_workers: 2", "num_workers: 1"))
    for stage in ("distillation", "assembly", "evaluation"):
        for record in Recorded(run).records(stage):
            Recorded(run).remove(stage, record.unit)
    for name in ("checkpoint", "evaluation", "logs"):
        shutil.rmtree(run / name)
    return str(config), run


def test_a_driver_whose_clock_is_an_hour_behind_its_workers(head: RayHead, finished_run: Path, tmp_path: Path) -> None:
    need_program("faketime", package="faketime")
    config, run = half_of(finished_run, tmp_path)
    arguments = command("run", config, "--set", f"cluster.address={head.address}")
    done = subprocess.run(
        ["faketime", "-f", "-1h", *arguments], cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = datetime.fromisoformat(next(read_events(run))["time"])
    assert timedelta(minutes=50) < datetime.now(UTC) - told < timedelta(minutes=70), "the driver's clock was changed"
    assert count(run, "trajectories") == {}, "records from an hour ahead are as good as any"
    assert files(run / "checkpoint") == files(finished_run / "run" / "checkpoint")


@pytest.mark.slow
def test_the_control_service_dies_and_the_run_goes_on_with_a_new_head(
    head: RayHead, finished_run: Path, tmp_path: Path
) -> None:
    config, run = half_of(finished_run, tmp_path)
    arguments = ("run", config, "--set", f"cluster.address={head.address}")
    driver = psutil.Popen(
        command(*arguments), cwd=ROOT, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for(run, "distillation", lambda: driver.poll() is None)
    [control_service] = [process for process in head.daemons() if process.name() == "gcs_server"]
    control_service.send_signal(signal.SIGKILL)
    output = driver.communicate(timeout=250)[0].decode()
    assert driver.returncode != 0, "a driver that cannot know its workers' fate stops"
    assert "Failed to connect to GCS" in output
    head.kill()
    head.start()
    done = head.call(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(run / "checkpoint") == files(finished_run / "run" / "checkpoint")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(mount_point)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip(
            "mounting a small file system takes root; tests/storage/test_full_disk.py covers what a worker does"
        )
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)  # a worker may not be gone yet


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_and_room_lets_it_go_on(finished_run: Path, small_disk: Path) -> None:
    config, run = half_of(finished_run, small_disk)
    arguments = ("run", config, "--set", "workers.max_attempts=1")
    driver = psutil.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(run, "distillation", lambda: driver.poll() is None)
    hog = small_disk / "hog"
    with hog.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    output = driver.communicate(timeout=120)[0].decode()
    assert driver.returncode == 1, output
    assert "No space left on device" in output
    assert "same command again" in output
    assert not (run / "checkpoint").exists()
    hog.unlink()
    done = call(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(run / "checkpoint") == files(finished_run / "run" / "checkpoint")


def test_times_of_files_and_events_mean_nothing(finished_run: Path, tmp_path: Path) -> None:
    config, run = copy_of(finished_run, tmp_path), tmp_path / "run"
    for number, path in enumerate(sorted(run.rglob("*"))):
        moment = time.time() + 3600 * (1 if number % 2 else -1)
        os.utime(path, (moment, moment))
    done = call("run", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 units done now" in done.stdout
    assert files(run / "checkpoint") == files(finished_run / "run" / "checkpoint")
