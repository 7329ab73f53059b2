"""A run in a bucket of a real S3 server: killed, damaged, cut off and contended for; it ends with the bytes of a local run."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.event_log import read_events
from storage.location import Location
from storage.run_directory import RunDirectory
from tests.pipeline.small_run import ROOT, command, files, small_run
from tests.s3_server import SECRET, S3Server, new_prefix, with_settings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SETTINGS = {"REELQUANT_LEASE_PERIOD_S": "1.5", "REELQUANT_STORE_PATIENCE_S": "120"}


@pytest.fixture
def start(s3: S3Server) -> Iterator[Callable[..., psutil.Popen]]:
    """Starts a command in a process of its own, its output in a file; what still runs at the end is killed."""
    processes: list[psutil.Popen] = []

    def begin(log: Path, *arguments: str) -> psutil.Popen:
        with log.open("w") as output:
            process = psutil.Popen(
                command(*arguments),
                cwd=ROOT,
                env=with_settings(s3, **SETTINGS),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def shown(*arguments: str) -> str:
    """Output of a command that succeeds, in this process, which has imported everything already."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def wait_for(what: str, found: Callable[[], Any], driver: psutil.Popen) -> None:
    deadline = time.monotonic() + 150
    while not found():
        assert time.monotonic() < deadline, f"no {what}"
        assert driver.poll() is None, f"the driver ended before there was {what}"
        time.sleep(0.1)


def damage_one_of(run: RunDirectory) -> str:
    """Turns one bit of an array that a sample has; returns the sample."""
    sample = run.manifest.units("activations")[1]
    record = run.manifest.read("activations", sample)
    assert record is not None
    data = max(record.outputs, key=lambda output: output.num_bytes)
    content = bytearray(run.store.read(data.path))
    content[len(content) // 2] ^= 1
    run.store.put(data.path, bytes(content))
    return sample


def times_finished(logs: Location, stage: str) -> dict[str, int]:
    done = [e["unit"] for e in read_events(logs) if e["event"] == "unit_finished" and e["stage"] == stage]
    return {unit: done.count(unit) for unit in done}


@pytest.mark.parametrize("outage_s", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_damage_an_outage_and_a_second_driver_cost_no_byte(
    finished_run: Path,
    tmp_path: Path,
    s3: S3Server,
    start: Callable[..., psutil.Popen],
    monkeypatch: pytest.MonkeyPatch,
    outage_s: float,
) -> None:
    run = RunDirectory(new_prefix("run"))
    config = str(small_run(tmp_path, run=str(run.location)))
    outputs = {name: tmp_path / f"{name}.log" for name in ("killed", "driver", "second")}

    killed = start(outputs["killed"], "run", config)
    # What lies outside the blocks may be done before the last activations are; a segment is not.
    wait_for(
        "calibrated segment", lambda: any("segment" in name for name in run.manifest.units("distillation")), killed
    )
    killed.kill()
    killed.wait()
    assert f"process {killed.pid} " in (run.store.driver().died or "")
    before = {stage: set(run.manifest.units(stage)) for stage in ("trajectories", "activations", "distillation")}
    sample = damage_one_of(run)

    driver = start(outputs["driver"], "run", config)
    wait_for("lease of the next driver", lambda: run.store.driver().at_work, driver)
    second = start(outputs["second"], "run", config)
    # Its words stay; that the record is missing does not, and may not be seen on a busy machine.
    wait_for("word of the damage", lambda: f"activations/{sample} is redone" in outputs["driver"].read_text(), driver)
    s3.cut()
    time.sleep(outage_s)
    s3.connect()
    assert second.wait() == 1
    assert driver.wait() == 0, outputs["driver"].read_text()

    assert f"is in use by process {driver.pid} on host" in outputs["second"].read_text()
    said = outputs["driver"].read_text()
    assert "answers again after" in said
    logs = run.location / "logs"
    assert set(run.manifest.units("activations")) == before["activations"]
    finished = {stage: times_finished(logs, stage) for stage in before}
    # What a driver said in the two seconds before it was killed is lost; what it recorded is not done again.
    assert all(finished[stage].get(unit, 0) <= 1 for stage in before for unit in before[stage] - {sample})
    assert finished["activations"][sample] >= 1
    monkeypatch.chdir(tmp_path)
    assert "All units are done" in shown("status", str(run.location))
    assert "sound" in shown("verify", f"{run.location}/checkpoint")
    assert f"{run.location}/report.html" in shown("report", str(run.location))
    assert (tmp_path / "run-report.html").read_bytes() == run.store.read("report.html")
    shown("fetch", str(run.location), str(tmp_path / "checkpoint"))
    assert files(tmp_path / "checkpoint") == files(finished_run / "run" / "checkpoint")
    assert_secret_is_nowhere(run, tmp_path)


def assert_secret_is_nowhere(run: RunDirectory, folder: Path) -> None:
    """Neither in any object of the run nor in anything that a driver said or wrote here."""
    secret = SECRET.encode()
    for part in ("manifest", "logs", "evaluation", "checkpoint", "blocks"):
        found = files(run.store.local_folder(part))
        assert found, part
        assert [name for name, content in found.items() if secret in content] == []
    for name in ("config.json", "run.lock", "report.html"):
        assert secret not in run.store.read(name)
    assert [name for name, content in files(folder).items() if secret in content] == []
