"""SIGKILL at any moment: what is on disk is whole or absent. Real processes, real kills."""

import contextlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from storage import zarr_array
from storage.atomic_files import sweep_partial_files
from storage.calibration_store import CalibrationStore
from storage.local_store import LocalStore
from storage.manifest import Manifest, UnitRecord
from storage.run_directory import RunDirectory, RunLocked
from tests.errors import raises

NUM_KILLS = 12
NUM_FILES = 300

# Each process is forked from a server that has torch and zarr loaded: some milliseconds instead of two seconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["storage.run_directory", "storage.zarr_array"])


class Victim:
    """A process that runs ``work(connection, *arguments)`` until it is killed."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process: ForkServerProcess = _CONTEXT.Process(target=work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        assert self.connection.poll(60), "the process says nothing"
        return self.connection.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(60)
        assert self.process.exitcode is not None
        self.process.close()
        self.connection.close()


def write_arrays(connection: Connection, root: Path, first: int) -> None:
    store = CalibrationStore(root)
    zarr_array.CHUNK_BYTES = 2**18
    for number in itertools.count(first):
        store.write("x/a", torch.full((1000 + number % 5, 700), float(number % 256), dtype=torch.bfloat16))
        connection.send(number)


def write_units(connection: Connection, path: Path) -> None:
    run = RunDirectory.open_or_create(path, {"seed": 1}, {})
    with run.lock():
        run.sweep_partial_files()
        connection.send(os.getpid())
        for number in itertools.count():
            unit = f"unit-{number % 7}"
            outputs = run.calibration_store.write(f"x/{unit}", torch.full((300, 300), float(number)))
            run.manifest.write(UnitRecord("s", unit, "0" * 32, outputs, {"n": number}, 0.1, "h", "cpu", 0, 1, "w"))
            connection.send(unit)


def drive_with_a_forked_child(connection: Connection, path: Path) -> None:
    run = RunDirectory.open_or_create(path, {}, {})
    with run.lock():
        child = os.fork()
        if child == 0:
            time.sleep(5)
            os._exit(0)
        connection.send(child)
        time.sleep(60)


def put_folders_in_place(connection: Connection, root: Path) -> None:
    """Again and again, and goes on when somebody takes them away."""

    def write(folder: Path) -> None:
        folder.mkdir()
        for index in range(NUM_FILES):
            (folder / str(index)).touch()

    store = LocalStore(root)
    while True:
        with contextlib.suppress(OSError):
            store.publish("array", write)
            connection.send("in place")


def race_for_the_lock(connection: Connection, path: Path) -> None:
    run = RunDirectory.open(path)
    connection.send("ready")
    begin = connection.recv()
    while time.time() < begin:
        pass
    try:
        with run.lock():
            connection.send("won")
            connection.recv()
    except RunLocked as error:
        connection.send(str(error))


def test_killed_array_writer_leaves_a_whole_array_or_none(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.zarr")
    seen, written = [], 0
    for attempt in range(NUM_KILLS):
        victim = Victim(write_arrays, store.root, written)
        written = victim.receive() + 1
        time.sleep(0.0013 * attempt)
        victim.kill()
        if not (store.root / "x/a").exists():
            seen.append("absent")
            continue
        tensor = store.read("x/a")
        (value,) = tensor.unique().tolist()
        assert value >= written - 1
        assert tensor.shape == (1000 + int(value) % 5, 700)
        seen.append("whole")
    assert "whole" in seen
    stray = list((store.root / "x").glob(".*.partial"))
    assert stray, "no kill hit a write"
    assert store.sweep_partial_files() == tuple(sorted(f"x/{path.name}" for path in stray))
    assert {path.name for path in (store.root / "x").iterdir()} <= {"a", "zarr.json"}


def test_a_sweep_never_leaves_half_of_what_a_living_writer_puts_in_place(tmp_path: Path) -> None:
    victim, swept = Victim(put_folders_in_place, tmp_path), 0
    writer = psutil.Process(victim.process.pid)
    for attempt in range(NUM_KILLS):
        victim.receive()
        time.sleep(0.0013 * attempt)
        swept += len(sweep_partial_files(tmp_path))
        writer.suspend()
        while writer.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        assert [len(list(folder.iterdir())) for folder in tmp_path.glob("array")] in ([], [NUM_FILES])
        writer.resume()
    victim.kill()
    assert swept, "no sweep met a writer"


def test_killed_driver_leaves_records_whose_outputs_are_whole_and_a_free_lock(tmp_path: Path) -> None:
    for attempt in range(NUM_KILLS):
        victim = Victim(write_units, tmp_path / "run")
        victim.receive()
        assert victim.receive() == "unit-0"
        time.sleep(0.0037 * attempt)
        victim.kill()
        run = RunDirectory.open(tmp_path / "run")
        with run.lock():
            pass
        manifest = Manifest(run)
        for record in manifest.records("s"):
            problems = manifest.missing_or_damaged(record, deep=True)
            if not (run.calibration_store.root / "x" / record.unit).exists():
                assert problems
                continue
            values = run.calibration_store.read(f"x/{record.unit}").unique().tolist()
            # An array that is not the record's was being redone when the kill came: whole, and the manifest says so.
            assert len(values) == 1
            assert values[0] % 7 == record.result["n"] % 7
            assert (values == [float(record.result["n"])]) == (not problems)
        assert manifest.records("s")


def test_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    victim = Victim(write_units, tmp_path)
    pid = victim.receive()
    run = RunDirectory.open(tmp_path)
    with raises(RunLocked, tmp_path, pid, "since"), run.lock():
        pass
    victim.kill()
    with run.lock():
        pass


def test_lock_does_not_live_on_in_a_forked_child(tmp_path: Path) -> None:
    victim = Victim(drive_with_a_forked_child, tmp_path)
    child = victim.receive()
    run = RunDirectory.open(tmp_path)
    with pytest.raises(RunLocked), run.lock():
        pass
    victim.kill()
    os.kill(child, 0)  # it lives
    with run.lock():
        pass


def test_two_processes_race_and_one_wins(tmp_path: Path) -> None:
    RunDirectory.open_or_create(tmp_path / "run", {}, {})
    for _ in range(4):
        racers = [Victim(race_for_the_lock, tmp_path / "run") for _ in range(2)]
        assert [racer.receive() for racer in racers] == ["ready", "ready"]
        begin = time.time() + 0.05
        for racer in racers:
            racer.connection.send(begin)
        answers = [racer.receive() for racer in racers]
        for racer in racers:
            racer.kill()
        assert sorted(answer == "won" for answer in answers) == [False, True]
        assert any("is in use by " in answer for answer in answers)


def test_concurrent_writers_of_one_name_leave_one_whole_array(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.zarr")
    writers = [Victim(write_arrays, store.root, 1000 * number) for number in range(3)]
    for _ in range(15):
        for writer in writers:
            writer.receive()
    for writer in writers:
        writer.kill()
    store.write("x/a", torch.ones(3))
    assert store.read("x/a").sum() == 3
