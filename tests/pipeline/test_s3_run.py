"""A run in a bucket of a real S3 server: killed, damaged, cut off and contended for; it ends with the bytes of a local run."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.event_log import read_events
from storage.location import Location
from storage.lock import driver_of
from storage.run_directory import RunDirectory
from tests.pipeline.small_run import ROOT, Recorded, command, files, small_run
from tests.s3_server import SECRET, S3Server, new_prefix, with_settings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SETTINGS = {"REELQUANT_STORE_PATIENCE_S": "120"}


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


def wait_for_word(log: Path, word: str, driver: psutil.Popen) -> None:
    """Until the driver says it: looks at its output, as looking into the bucket would keep the server from serving."""
    deadline = time.monotonic() + 150
    while word not in log.read_text():
        assert time.monotonic() < deadline, f"no {word!r}"
        assert driver.poll() is None, f"the driver ended before it said {word!r}: {log.read_text()}"
        time.sleep(0.1)


def damage_one_of(run: RunDirectory) -> str:
    """Turns one bit of an array that a sample has; returns the sample."""
    record = Recorded(run).records("activations")[1]
    data = max(record.outputs, key=lambda output: output.num_bytes)
    key, place = f"{record.key}/{record.attempt}/{data.path}", run.cache.place
    content = bytearray(place.read(key))
    content[len(content) // 2] ^= 1
    place.put(key, bytes(content))
    return record.unit


def times_finished(run: Location, stage: str) -> dict[str, int]:
    done = [e["unit"] for e in read_events(run) if e["event"] == "unit_finished" and e["stage"] == stage]
    return {unit: done.count(unit) for unit in done}


@pytest.mark.parametrize("outage_s", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_a_kill_damage_an_outage_and_a_second_driver_cost_no_byte(
    finished_run: Path,
    tmp_path: Path,
    s3: S3Server,
    start: Callable[..., psutil.Popen],
    monkeypatch: pytest.MonkeyPatch,
    outage_s: float,
) -> None:
    run = RunDirectory(new_prefix("run"))
    config = str(small_run(tmp_path, run=str(run.location)))
    outputs = {name: tmp_path / f"{name}.log" for name in ("killed", "first", "second")}
    killed = start(outputs["killed"], "run", config)
    # What lies outside the blocks may be done before the last activations are; a segment is not.
    wait_for_word(outputs["killed"], "segment-", killed)
    killed.kill()
    killed.wait()
    assert f"process {killed.pid} " in (driver_of(run.location).died or "")
    before = {stage: set(Recorded(run).units(stage)) for stage in ("trajectories", "activations", "distillation")}
    sample = damage_one_of(run)

    first = start(outputs["first"], "run", config)
    wait_for_word(outputs["first"], f"activations/{sample} is redone", first)
    second = start(outputs["second"], "run", config)
    wait_for_word(outputs["second"], "is in use by", second)
    s3.cut()
    time.sleep(outage_s)
    s3.connect()
    for name, driver in (("first", first), ("second", second)):
        assert driver.wait() == 0, outputs[name].read_text()
    assert f"is in use by process {first.pid} on host" in outputs["second"].read_text()
    assert "is in use by" not in outputs["first"].read_text()

    assert set(Recorded(run).units("activations")) == before["activations"]
    finished = {stage: times_finished(run.location, stage) for stage in before}
    assert all(finished[stage][unit] == 1 for stage in before for unit in before[stage] - {sample})
    assert finished["activations"][sample] in (2, 3), "by either driver, or by both"
    monkeypatch.chdir(tmp_path)
    assert "All units are done" in shown("status", str(run.location))
    assert "sound" in shown("verify", f"{run.location}/checkpoint")
    assert f"{run.location}/report.html" in shown("report", str(run.location))
    assert (tmp_path / "run-report.html").read_bytes() == run.place.read("report.html")
    shown("fetch", str(run.location), str(tmp_path / "checkpoint"))
    assert files(tmp_path / "checkpoint") == files(finished_run / "run" / "checkpoint")
    assert_secret_is_nowhere(run, tmp_path)


def test_expired_credentials_stop_a_run_with_a_sentence(
    tmp_path: Path, s3: S3Server, start: Callable[..., psutil.Popen]
) -> None:
    log = tmp_path / "driver.log"
    driver = start(log, "run", str(small_run(tmp_path, run=new_prefix("run"))))
    wait_for_word(log, "Trajectories: 1/2", driver)
    s3.credentials_expired = True
    try:
        assert driver.wait() == 1
    finally:
        s3.credentials_expired = False
    said = log.read_text()
    assert "error:" in said
    assert "AWS_ACCESS_KEY_ID" in said
    assert "same command again" in said
    assert "Traceback" not in said
    assert SECRET not in said


def assert_secret_is_nowhere(run: RunDirectory, folder: Path) -> None:
    """Neither in any object of the run nor in anything that a driver said or wrote here."""
    secret = SECRET.encode()
    found = [key for key, _, _ in run.place.files()]
    assert {key.partition("/")[0] for key in found} >= {"cache", "logs", "evaluation", "checkpoint", "units.json"}
    assert [key for key in found if secret in run.place.read(key)] == []
    assert [name for name, content in files(folder).items() if secret in content] == []
