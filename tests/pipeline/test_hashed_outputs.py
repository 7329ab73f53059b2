"""A driver's start hashes the outputs that it does not know, or that look otherwise than when they were hashed."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.context import Run
from pipeline.done_units import DoneUnits
from pipeline.stages.stage import StageUnit
from storage.cache import ALWAYS_HASHED_BYTES, UnitRecord
from storage.folder import Folder
from storage.hashed_files import NAME
from storage.run_directory import RunDirectory
from storage.unit_store import UnitAddress, UnitStore

UNITS = ("first", "second")


def output_of(run: Path, unit: str) -> Path:
    [file] = (run / "cache" / "evaluation" / unit).rglob(f"{unit}.bin")
    return file


def do_unit(run: RunDirectory, unit: str, content: bytes | None = None) -> UnitRecord:
    content = unit[:1].encode() * (ALWAYS_HASHED_BYTES + 1) if content is None else content
    with UnitStore(UnitAddress(run.cache.location, run.location, "evaluation", unit, unit)) as store:
        store.write_file(f"evaluation/{unit}/{unit}.bin", lambda path: path.write_bytes(content))
        outputs = store.publish()
    record = UnitRecord("evaluation", unit, unit, store.attempt, outputs, {}, 1.0, "h", "cpu", 1, 1, "w")
    return run.cache.create(record, run.place)


def start(run: Path, *, rehash: bool = False) -> list[str]:
    """Units that a driver finds done."""
    opened = run_of(run)
    found = DoneUnits(lambda *_: None, rehash=rehash)
    units = [path.parent.name for path in sorted((run / "cache" / "evaluation").glob("*/record.json"))]
    return [unit for unit in units if found.find(opened, "evaluation", StageUnit(unit, None, unit)) is not None]


def run_of(run: Path) -> Run:
    directory = RunDirectory(run)
    return Run(None, directory, directory.cache)  # type: ignore[arg-type]  # nothing here reads a configuration


def change_a_byte(file: Path, *, same_time: bool) -> None:
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    time = before.st_mtime_ns if same_time else before.st_mtime_ns + 1
    os.utime(file, ns=(before.st_atime_ns, time))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose units nobody has noted as hashed, as older programs left it."""
    directory = RunDirectory.open_or_create(tmp_path / "run", {}, {})
    for unit in UNITS:
        do_unit(directory, unit)
    return directory.path


def test_all_is_hashed_that_was_never_noted(run: Path) -> None:
    change_a_byte(output_of(run, "second"), same_time=True)
    assert start(run) == ["first"]
    assert start(run) == ["first"]


def test_a_newer_file_of_the_same_size_is_hashed_again(run: Path) -> None:
    assert start(run) == [*UNITS]
    change_a_byte(output_of(run, "first"), same_time=False)
    assert start(run) == ["second"]


def test_a_file_of_the_same_size_and_time_is_not_read_unless_asked(run: Path) -> None:
    assert start(run) == [*UNITS]
    change_a_byte(output_of(run, "first"), same_time=True)
    assert start(run) == [*UNITS]
    assert start(run, rehash=True) == ["second"]


def test_a_file_that_only_looks_newer_is_noted_anew(run: Path) -> None:
    assert start(run) == [*UNITS]
    os.utime(output_of(run, "first"), ns=(1, 1))
    assert start(run) == [*UNITS]
    change_a_byte(output_of(run, "first"), same_time=True)
    assert start(run) == [*UNITS], "it was read by the start before"


def test_the_unit_of_a_driver_is_noted_when_it_is_done(run: Path) -> None:
    record = do_unit(RunDirectory(run), "third")
    DoneUnits(lambda *_: None).finished(run_of(run), record)
    change_a_byte(output_of(run, "third"), same_time=True)
    assert start(run) == [*UNITS, "third"]


def test_a_noted_file_does_not_stand_for_another_content(run: Path) -> None:
    assert start(run) == [*UNITS]
    file = output_of(run, "first")
    before = file.stat()
    (run / "cache" / "evaluation" / "first" / "record.json").unlink()
    record = do_unit(RunDirectory(run), "first", b"x" * before.st_size)
    attempt = file.parent
    shutil.rmtree(attempt)
    (attempt.parent / str(record.attempt)).rename(attempt)
    path = run / "cache" / "evaluation" / "first" / "record.json"
    path.unlink()
    RunDirectory(run).cache.create(replace(record, attempt=attempt.name), Folder(run))
    change_a_byte(file, same_time=True)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert start(run) == ["second"]


@pytest.mark.parametrize(
    "torn", ['{"evaluation/first/a/first.bin": [655', "[]", "7", '{"evaluation/first/a/first.bin": 7}', '{"a": ["b"]}']
)
def test_a_torn_line_costs_a_hash(run: Path, torn: str) -> None:
    assert start(run) == [*UNITS]
    (run / "cache" / NAME).write_text(torn)
    assert start(run) == [*UNITS]
    change_a_byte(output_of(run, "second"), same_time=True)
    assert start(run) == [*UNITS], "noted behind the torn line"
