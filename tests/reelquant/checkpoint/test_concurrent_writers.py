"""Writers of one checkpoint that are killed, that hang, and that work at once. Real processes, real signals."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest

from storage.atomic_files import sweep_partial_files
from tests.reelquant.checkpoint.repeated_writer import write, write_on_and_on
from tests.reelquant.checkpoint.test_writer import files

NUM_KILLS = 8
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.reelquant.checkpoint.repeated_writer"])


class Writer:
    """A process that writes a checkpoint on and on."""

    def __init__(self, source: Path, output: Path, artifacts: list[Path]) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process: ForkServerProcess = _CONTEXT.Process(
            target=write_on_and_on, args=(theirs, source, output, artifacts), daemon=True
        )
        self._process.start()
        theirs.close()

    def stop(self) -> None:
        process = psutil.Process(self._process.pid)
        process.suspend()
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)

    def go_on(self) -> None:
        psutil.Process(self._process.pid).resume()

    def written(self) -> int:
        """Waits for the next one, and says how many it has written."""
        assert self._connection.poll(60), "the process says nothing"
        number = self._connection.recv()
        assert isinstance(number, int), number
        return number

    def forget(self) -> None:
        while self._connection.poll(0):
            self.written()

    def kill(self) -> None:
        self._process.kill()
        self._process.join(60)
        assert self._process.exitcode == -signal.SIGKILL


@pytest.fixture
def writers(tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path) -> Iterator[list[Writer]]:
    started = [Writer(tiny_source, tmp_path / "out", tiny_artifacts) for _ in range(2)]
    yield started
    for writer in started:
        writer.kill()


@pytest.fixture(scope="module")
def expected(tiny_source: Path, tiny_artifacts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files and checksums of the checkpoint."""
    output = tmp_path_factory.mktemp("expected") / "out"
    write(tiny_source, output, tiny_artifacts)
    return files(output)


def in_the_middle(folder: Path) -> list[Path]:
    """Weight files of checkpoints that are not finished."""
    return list(folder.glob(".out.*.partial/out/transformer/*.safetensors"))


def stop_in_the_middle(writer: Writer, folder: Path) -> set[Path]:
    """Stops the process at a moment when it has written a part; what it has then."""
    while True:
        writer.stop()
        if found := in_the_middle(folder):
            return set(found)
        writer.go_on()
        time.sleep(0.005)


def test_a_killed_writer_leaves_the_checkpoint_whole_or_absent(
    tiny_source: Path, tiny_artifacts: list[Path], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for index in range(NUM_KILLS):
        writer = Writer(tiny_source, output, tiny_artifacts)
        if index % 2:
            assert writer.written() == 1
        left = stop_in_the_middle(writer, tmp_path)
        writer.kill()
        assert left <= set(in_the_middle(tmp_path))
        assert not output.exists() or files(output) == expected
    assert sweep_partial_files(tmp_path)
    write(tiny_source, output, tiny_artifacts)
    assert files(output) == expected
    assert os.listdir(tmp_path) == ["out"]


def test_a_writer_that_hangs_and_its_successor_do_not_disturb_each_other(
    tiny_source: Path, tiny_artifacts: list[Path], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    hanging = Writer(tiny_source, output, tiny_artifacts)
    left = stop_in_the_middle(hanging, tmp_path)
    for _ in range(2):
        write(tiny_source, output, tiny_artifacts)
        assert files(output) == expected
        assert set(in_the_middle(tmp_path)) == left, "it lives: nobody takes away what it has"
    hanging.forget()
    hanging.go_on()
    hanging.written()
    hanging.written()
    hanging.stop()
    assert not output.exists() or files(output) == expected
    hanging.kill()


def test_writers_at_once_all_succeed(
    writers: list[Writer], tiny_source: Path, tiny_artifacts: list[Path], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    while min(writer.written() for writer in writers) < 5:
        write(tiny_source, output, tiny_artifacts)
    for writer in writers:
        writer.kill()
    write(tiny_source, output, tiny_artifacts)
    assert files(output) == expected
