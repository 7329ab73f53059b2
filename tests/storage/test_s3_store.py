"""What only a bucket has: outages, lost answers, a lease that is taken over, and credentials that must not be seen."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import obstore
import pytest
import torch
import zarr

from storage import zarr_array
from storage.calibration_store import CalibrationStore, DamagedArray
from storage.location import StoreUrl, parse_location
from storage.manifest import Manifest, UnitRecord
from storage.open_store import open_store
from storage.run_directory import RunDirectory
from storage.run_store import LeaseLost, RunLocked, StoreUnreachable
from storage.zarr_array import write_array
from tests.errors import names, raises
from tests.s3_server import SECRET, S3Server, new_prefix, with_settings

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import signal, sys, time
from storage.run_directory import RunDirectory
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
with RunDirectory(sys.argv[1]).lock():
    print("at work", flush=True)
    time.sleep(60)
"""


class Driver:
    """A process that holds the run's lease and does nothing."""

    def __init__(self, server: S3Server, url: str) -> None:
        settings = {name: os.environ[name] for name in ("REELQUANT_LEASE_PERIOD_S", "REELQUANT_STORE_PATIENCE_S")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, url],
            cwd=ROOT, env=with_settings(server, **settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "at work\n"

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def errors(self) -> str:
        """Once it has ended; one that was frozen within a request first waits that request out (30 s)."""
        return self.process.communicate(timeout=90)[1]


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    started: list[Driver] = []
    yield started
    for driver in started:
        driver.process.kill()
        driver.process.communicate()


def empty_record(unit: str, fingerprint: str) -> UnitRecord:
    return UnitRecord("selection", unit, fingerprint, (), {}, 1.0, "host", "cpu", 1, 1, "worker")


def test_an_outage_is_waited_out(s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(new_prefix("run"))
    store.put("a", b"before")
    s3.cut()
    threading.Timer(2.0, s3.connect).start()
    with caplog.at_level(logging.WARNING):
        begun = time.monotonic()
        store.put("b", b"after", exclusive=True)
    assert 1.5 < time.monotonic() - begun < 20
    assert (store.read("a"), store.read("b")) == (b"before", b"after")
    assert [names(record.message, store.location) for record in caplog.records] == [True] * 2, "cut off, and back again"
    assert SECRET not in caplog.text


def test_a_longer_outage_names_the_store_and_the_ways_out(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELQUANT_STORE_PATIENCE_S", "0.5")
    store = open_store(url := new_prefix("run"))
    s3.cut()
    try:
        with raises(StoreUnreachable, url, "REELQUANT_STORE_PATIENCE_S") as caught:
            store.put("a", b"")
    finally:
        s3.connect()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_lost_answer_is_no_loss(s3: S3Server, exclusive: bool) -> None:
    store = open_store(new_prefix("run"))
    s3.lose_answers(1)
    store.put("a", b"written once", exclusive=exclusive)
    assert store.read("a") == b"written once"
    with raises(FileExistsError, "run/a"):
        store.put("a", b"other", exclusive=True)


def test_the_lease_survives_an_outage_and_lost_answers(s3: S3Server) -> None:
    run = RunDirectory.open_or_create(new_prefix("run"), {}, {})
    with run.lock():
        s3.cut()
        time.sleep(1.0)
        s3.connect()
        s3.lose_answers(1)
        time.sleep(1.5)
        run.manifest.write(empty_record("u", "1"))
        assert run.store.driver().at_work is not None


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_a_lease_that_cannot_be_renewed_is_lost_with_its_reason(s3: S3Server, in_main_thread: bool) -> None:
    run = RunDirectory.open_or_create(new_prefix("run"), {}, {})

    def drive() -> None:
        with run.lock():
            s3.credentials_expired = True
            if in_main_thread:
                time.sleep(60)  # interrupted
            while True:
                time.sleep(0.05)
                run.manifest.write(empty_record("u", "1"))

    try:
        if in_main_thread:
            with pytest.raises(LeaseLost) as caught:
                drive()
            error: BaseException | None = caught.value
        else:
            with ThreadPoolExecutor(1) as pool:
                error = pool.submit(drive).exception(timeout=60)
    finally:
        s3.credentials_expired = False
    assert isinstance(error, LeaseLost if in_main_thread else OSError)
    assert isinstance(error.__cause__, PermissionError) or not in_main_thread
    assert names(str(error), run.location, "ExpiredToken", "AWS_ACCESS_KEY_ID")
    assert SECRET not in str(error)
    with run.lock():  # this machine's process lives, but the lease is free for whoever may renew it
        pass


def test_a_log_that_cannot_be_written_says_so_at_its_end_too(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.s3_log.FLUSH_S", 0.05)
    store = open_store(new_prefix("run"))
    s3.credentials_expired = True
    try:
        log = store.open_log("logs", "events.jsonl")
        log.append("a line")
        errors: list[OSError] = []
        deadline = time.monotonic() + 60
        while not errors and time.monotonic() < deadline:
            time.sleep(0.05)
            try:
                log.append("one more")
            except PermissionError as error:
                errors.append(error)
        assert "ExpiredToken" in str(errors[0])
        with raises(PermissionError, "ExpiredToken", "AWS_ACCESS_KEY_ID"):
            log.close()
    finally:
        s3.credentials_expired = False


def test_a_killed_driver_of_this_machine_is_replaced_at_once(s3: S3Server, drivers: list[Driver]) -> None:
    run = RunDirectory.open_or_create(new_prefix("run"), {}, {})
    drivers.append(first := Driver(s3, str(run.location)))
    with raises(RunLocked, run.location, first.process.pid), run.lock():
        pass
    first.send(signal.SIGKILL)
    first.process.wait()
    assert f"process {first.process.pid} " in (run.store.driver().died or "")
    begun = time.monotonic()
    with run.lock():
        assert time.monotonic() - begun < 1.0
        assert run.store.epoch == 2
    assert run.store.epoch == 0


def test_a_frozen_driver_is_replaced_after_six_periods_and_stops_when_it_wakes(
    s3: S3Server, drivers: list[Driver]
) -> None:
    run = RunDirectory.open_or_create(new_prefix("run"), {}, {})
    drivers.append(first := Driver(s3, str(run.location)))
    first.send(signal.SIGSTOP)
    begun = time.monotonic()
    with run.lock():
        assert 1.8 <= time.monotonic() - begun < 15
        first.send(signal.SIGCONT)
        assert names(first.errors(), "LeaseLost", run.location)
        assert first.process.returncode not in (0, -signal.SIGINT)


def test_an_ousted_driver_cannot_write_over_a_later_ones_records(s3: S3Server) -> None:
    run = RunDirectory.open_or_create(new_prefix("run"), {}, {})
    for fingerprint in ("1", "2"):
        with run.lock():
            run.manifest.write(empty_record("u", fingerprint))
    with raises(LeaseLost, "manifest/selection/u.json"):
        run.manifest.write(empty_record("u", "3"))  # as one whose epoch is over
    found = Manifest(run.location).read("selection", "u")
    assert found is not None
    assert found.fingerprint == "2"


def test_an_upload_that_is_cut_off_leaves_no_checkpoint(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELQUANT_STORE_PATIENCE_S", "0.3")
    store = open_store(new_prefix("run"))

    def writer(name: str, *, then_silent: bool = False) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.mkdir()
            for file in (name, "model_index.json"):
                (path / file).write_text(file)
            if then_silent:
                s3.lose_answers(10**6, after=3)  # the listing, and the removal of the index and of what is old

        return write

    store.publish("checkpoint", writer("a"), last="model_index.json")
    try:
        with pytest.raises(StoreUnreachable):
            store.publish("checkpoint", writer("b", then_silent=True), last="model_index.json")
    finally:
        s3.lose_answers(0)
    assert "model_index.json" not in store.names("checkpoint")
    store.publish("checkpoint", writer("c"), last="model_index.json")
    assert store.names("checkpoint") == ["c", "model_index.json"]


def test_an_upload_that_is_cut_off_leaves_no_array(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the old array and of the new one, each with a checksum that holds, are no array."""
    monkeypatch.setenv("REELQUANT_STORE_PATIENCE_S", "0.3")
    monkeypatch.setattr(zarr_array, "CHUNK_BYTES", 1024)
    store = CalibrationStore(parse_location(new_prefix("run")) / "calibration.zarr")
    store.write("x/a", torch.zeros(3000, 3))

    def silent_after(folder: Path, tensor: torch.Tensor) -> None:
        write_array(folder, tensor)
        s3.lose_answers(10**6, after=4)  # the listing, the removal of the metadata, two chunks

    try:
        with monkeypatch.context() as patch:
            patch.setattr(zarr_array, "write_array", silent_after)
            with pytest.raises(StoreUnreachable):
                store.write("x/a", torch.ones(3000, 3))
    finally:
        s3.lose_answers(0)
    run = open_store(store.location.parent)
    chunks = [run.read(f"calibration.zarr/x/a/{name}") for name in run.names("calibration.zarr/x/a")]
    assert (len(chunks), len(set(chunks))) == (36, 2)
    with raises(DamagedArray, "x/a", "zarr.json"):
        store.read("x/a")
    store.write("x/a", torch.ones(100, 3))
    assert torch.equal(store.read("x/a"), torch.ones(100, 3))


def test_a_store_that_ignores_conditions_is_refused(s3: S3Server) -> None:
    run = RunDirectory.open_or_create(new_prefix("run"), {}, {})
    s3.hides_conditions = True
    try:
        with raises(ValueError, "If-None-Match", "If-Match"), run.lock():
            pass
    finally:
        s3.hides_conditions = False


def test_other_zarr_readers_open_the_arrays(s3: S3Server) -> None:
    run = RunDirectory(new_prefix("run"))
    tensor = torch.randn(3000, 1500)
    run.calibration_store.write("x/y", tensor)
    url = run.location
    assert isinstance(url, StoreUrl)
    bucket = obstore.store.S3Store(
        url.bucket, prefix=f"{url.key}/calibration.zarr", client_options={"allow_http": True}
    )
    group = zarr.open_group(zarr.storage.ObjectStore(bucket, read_only=True), mode="r")
    array = group["x/y"]
    assert isinstance(array, zarr.Array)
    assert torch.equal(torch.from_numpy(np.asarray(array[...])), tensor)


def test_plain_http_must_be_allowed(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with raises(ValueError, "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP=true"):
        open_store(new_prefix("run"))


def test_a_bucket_that_is_not_there(s3: S3Server) -> None:
    with raises(ValueError, "s3://no-such-bucket/run", "no-such-bucket"):
        RunDirectory.open_or_create("s3://no-such-bucket/run", {}, {})


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "obstore.py").write_text("raise ModuleNotFoundError(\"No module named 'obstore'\", name='obstore')\n")
    program = "from storage.open_store import open_store; open_store('s3://bucket/run')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert names(done.stderr, "ValueError", "s3://bucket/run", "obstore")
