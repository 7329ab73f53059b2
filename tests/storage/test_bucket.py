"""What only a bucket has: outages, lost answers, two drivers at once, and credentials that expire and must not be seen."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import obstore
import pytest
import torch
import zarr

from storage.line_log import open_log
from storage.location import StoreUrl, parse_location
from storage.lock import LOCK_FILE, driver_of
from storage.open_place import open_place
from storage.place import StoreUnreachable
from storage.recorded_outputs import DamagedArray
from storage.run_directory import RunDirectory
from tests.errors import names, raises
from tests.s3_server import SECRET, S3Server, new_prefix, with_settings
from tests.storage.stores import U, done, record_of, unit_store

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import sys, time
from storage.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("at work", flush=True)
    time.sleep(60)
"""


def test_what_was_listed_counts_no_longer_than_its_body(s3: S3Server) -> None:
    """Also where bodies of several threads overlap, which share the place of a cache."""
    place = open_place(new_prefix("cache"))
    for key in ("a/x", "b/x"):
        place.put(key, b"content")
    first, second = place.listed("a"), place.listed("b")
    first.__enter__()
    second.__enter__()
    place.remove("a/x")
    assert place.stat("a/x").num_bytes == 7
    first.__exit__(None, None, None)
    with pytest.raises(FileNotFoundError):
        place.stat("a/x")
    second.__exit__(None, None, None)
    place.remove("b/x")
    for key in ("a/x", "b/x"):
        with pytest.raises(FileNotFoundError):
            place.stat(key)


def test_an_outage_is_waited_out(s3: S3Server) -> None:
    place = open_place(new_prefix("run"))
    place.put("a", b"before")
    s3.cut()
    threading.Timer(2.0, s3.connect).start()
    place.put("b", b"after", exclusive=True)
    assert (place.read("a"), place.read("b")) == (b"before", b"after")


def test_an_outage_in_the_middle_of_files_is_waited_out(s3: S3Server) -> None:
    """Connections that break within a request: while files are sent, and while they are fetched."""
    run = parse_location(new_prefix("run"))
    tensor = torch.randn(6000, 2000)

    def cut_soon() -> None:
        time.sleep(0.1)
        s3.cut()
        time.sleep(1.0)
        s3.connect()

    breaking = threading.Thread(target=cut_soon)
    breaking.start()
    record = done(run, "u", **dict.fromkeys("abcd", tensor))
    breaking.join()
    breaking = threading.Thread(target=cut_soon)
    breaking.start()
    with unit_store(run, "v", u=record.fingerprint) as store:
        assert all(torch.equal(store.read(U + name), tensor) for name in "abcd")
    breaking.join()


def test_a_longer_outage_names_the_store_and_the_ways_out(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELQUANT_STORE_PATIENCE_S", "0.5")
    place = open_place(url := new_prefix("run"))
    s3.cut()
    try:
        with raises(StoreUnreachable, url, "REELQUANT_STORE_PATIENCE_S") as caught:
            place.put("a", b"")
    finally:
        s3.connect()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_lost_answer_is_no_loss(s3: S3Server, exclusive: bool) -> None:
    place = open_place(new_prefix("run"))
    s3.lose_answers(1)
    place.put("a", b"written once", exclusive=exclusive)
    assert place.read("a") == b"written once"
    with raises(FileExistsError, "run"):
        place.put("a", b"other", exclusive=True)


def test_expired_credentials_are_told_in_a_sentence_by_every_request(s3: S3Server) -> None:
    run = parse_location(new_prefix("run"))
    record = done(run, "u", a=torch.ones(3))
    place, log = open_place(run), open_log(run, "logs/events.jsonl")
    reader = unit_store(run, "v", u=record.fingerprint)
    s3.credentials_expired = True
    requests: dict[str, Callable[[], object]] = {
        "put": lambda: place.put("a", b"x"),
        "create": lambda: place.put("b", b"x", exclusive=True),
        "read": lambda: place.read("a"),
        "stat": lambda: place.stat("a"),
        "list": lambda: place.names("a"),
        "list all": lambda: place.files("a"),
        "remove": lambda: place.remove("a"),
        "checksum": lambda: place.checksum("a"),
        "log": lambda: log.append("a line"),
        "array": lambda: reader.read(U + "a"),
        "lock": lambda: RunDirectory(run).lock().__enter__(),
    }
    try:
        for name, request in requests.items():
            with raises(PermissionError, f"{run}", "AWS_ACCESS_KEY_ID") as caught:
                request()
            assert "ExpiredToken" in str(caught.value) or name in ("stat", "checksum"), "HEAD has no text"
            assert SECRET not in str(caught.value)
    finally:
        s3.credentials_expired = False


def test_a_second_driver_is_told_of_the_first_and_may_go_on(s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDirectory.open_or_create(new_prefix("run"), {}, {})
    environment = with_settings(s3, PYTHONPATH=str(ROOT))
    first = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run.location)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "at work\n"
        assert names(driver_of(run.location).at_work or "", "process", first.pid)
        with caplog.at_level(logging.WARNING), run.lock():
            assert names(caplog.text, run.location, f"process {first.pid} on host")
            assert names(driver_of(run.location).at_work or "", f"process {os.getpid()}")
        assert LOCK_FILE not in run.place.names()
    finally:
        first.kill()
        first.communicate()


def test_a_killed_driver_of_this_machine_is_not_taken_for_one_at_work(
    s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory.open_or_create(new_prefix("run"), {}, {})
    environment = with_settings(s3, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", DRIVER, str(run.location)]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "at work\n"
    first.kill()
    first.communicate()
    assert f"process {first.pid} " in (driver_of(run.location).died or "")
    with caplog.at_level(logging.WARNING), run.lock():
        assert caplog.text == ""


def test_two_drivers_have_one_record_and_readers_its_attempt(s3: S3Server) -> None:
    run = parse_location(new_prefix("run"))
    records = []
    for value in (1.0, 2.0):  # results need not be the same to the bit
        with unit_store(run) as store:
            store.write(U + "a", torch.full((3,), value))
            records.append(store.cache.create(record_of(store), store.run))
    assert records[0] == records[1]
    with unit_store(run, "v", u=records[0].fingerprint) as reader:
        assert reader.read(U + "a").tolist() == [1.0] * 3


def test_an_upload_that_is_cut_off_is_no_unit(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELQUANT_STORE_PATIENCE_S", "0.3")
    run = parse_location(new_prefix("run"))
    try:
        with unit_store(run) as store:
            for name in "abc":
                store.write(U + name, torch.ones(3000, 3))
            s3.lose_answers(10**6, after=2)
            with pytest.raises(StoreUnreachable):
                store.publish()
    finally:
        s3.lose_answers(0)
    assert open_place(run / "cache").files() != []
    assert store.cache.read("trajectories", store._address.fingerprint) is None
    record = done(run, "u", a=torch.ones(3))
    with unit_store(run, "v", u=record.fingerprint) as reader:
        assert reader.read(U + "a").sum() == 3
        with raises(DamagedArray, U + "b"):
            reader.read(U + "b")


def test_an_upload_that_is_cut_off_leaves_no_checkpoint(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELQUANT_STORE_PATIENCE_S", "0.3")
    place = open_place(new_prefix("run"))

    def write(path: Path) -> None:
        path.mkdir()
        for file in ("a", "b", "model_index.json"):
            (path / file).write_text(file)
        s3.lose_answers(10**6, after=1)

    try:
        with pytest.raises(StoreUnreachable):
            place.put_folder("checkpoint", write, last="model_index.json")
    finally:
        s3.lose_answers(0)
    assert "model_index.json" not in place.names("checkpoint")


def test_other_zarr_readers_open_the_arrays(s3: S3Server) -> None:
    url = parse_location(new_prefix("run"))
    assert isinstance(url, StoreUrl)
    tensor = torch.randn(3000, 1500)
    record = done(url, "u", y=tensor)
    bucket = obstore.store.S3Store(
        url.bucket,
        prefix=f"{url.key}/cache/{record.key}/{record.attempt}",
        client_options={"allow_http": True},
    )
    group = zarr.open_group(zarr.storage.ObjectStore(bucket, read_only=True), mode="r")
    array = group["y"]
    assert isinstance(array, zarr.Array)
    assert torch.equal(torch.from_numpy(np.asarray(array[...])), tensor)


def test_plain_http_must_be_allowed(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with raises(ValueError, "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP=true"):
        open_place(new_prefix("run"))


def test_a_bucket_that_is_not_there(s3: S3Server) -> None:
    with raises(ValueError, "s3://no-such-bucket/run", "no-such-bucket"):
        RunDirectory.open_or_create("s3://no-such-bucket/run", {}, {})


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "obstore.py").write_text("raise ModuleNotFoundError(\"No module named 'obstore'\", name='obstore')\n")
    program = "from storage.open_place import open_place; open_place('s3://bucket/run')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert names(done.stderr, "ValueError", "s3://bucket/run", "obstore")
