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

from storage import arrays
from storage.atomic_files import sweep_partial_files
from storage.folder import Folder
from storage.lock import RunLocked
from storage.run_directory import RunDirectory
from tests.errors import raises
from tests.storage.stores import record_of, unit_store

NUM_KILLS = 12
NUM_FILES = 300

# Each process is forked from a server that has torch and zarr loaded: some milliseconds instead of two seconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["storage.run_directory", "storage.arrays"])


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


def write_units(connection: Connection, path: Path) -> None:
    run = RunDirectory.open_or_create(path, {"seed": 1}, {})
    arrays.CHUNK_BYTES = 2**16
    with run.lock():
        run.sweep()
        connection.send(os.getpid())
        for number in itertools.count():
            unit = f"unit-{number % 7}"
            with unit_store(path, unit) as store:
                store.write(f"trajectories/{unit}/a", torch.full((300, 300), float(number)))
                record = record_of(store, unit, result={"n": number})
                store.cache.remove(record.stage, record.fingerprint)  # as one that is found damaged
                store.cache.create(record, store.run)
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

    place = Folder(root)
    while True:
        with contextlib.suppress(OSError):
            place.put_folder("checkpoint", write, last="0")
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
        assert [len(list(folder.iterdir())) for folder in tmp_path.glob("checkpoint")] in ([], [NUM_FILES])
        writer.resume()
    victim.kill()
    assert swept, "no sweep met a writer"


def test_killed_driver_leaves_records_whose_outputs_are_whole_and_a_free_lock(tmp_path: Path) -> None:
    dead = 0
    for attempt in range(NUM_KILLS):
        victim = Victim(write_units, tmp_path / "run")
        victim.receive()
        assert victim.receive() == "unit-0"
        time.sleep(0.0037 * attempt)
        victim.kill()
        run = RunDirectory.open(tmp_path / "run")
        with run.lock():
            pass
        dead += len(list(run.cache.dead_attempts()))
        found = [run.cache.read(*entry) for entry in run.cache.entries()]
        for record in found:
            if record is None:
                continue
            assert run.cache.problems(record, run.place, deep=True) == []
            reader = run.outputs({(record.stage, record.unit): record})
            assert reader.read(f"trajectories/{record.unit}/a").unique().tolist() == [record.result["n"]]
        assert any(found)
    assert dead, "no kill hit an attempt"


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
