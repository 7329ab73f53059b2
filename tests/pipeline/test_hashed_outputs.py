"""A driver's start hashes the outputs that it does not know, or that look otherwise than when they were hashed."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.context import Run
from pipeline.runner import driven_runs
from storage.hashed_files import NAME
from storage.manifest import ALWAYS_HASHED_BYTES, HeldManifest, Manifest, OutputFile, UnitRecord
from storage.run_directory import RunDirectory

UNITS = ("first", "second")


def output_of(run: Path, unit: str) -> Path:
    return run / "evaluation" / f"{unit}.bin"


def do_unit(manifest: Manifest, unit: str) -> None:
    file = output_of(manifest.run, unit)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(unit[:1].encode() * (ALWAYS_HASHED_BYTES + 1))
    outputs = (OutputFile.describe(file, run=manifest.run),)
    manifest.write(UnitRecord("evaluation", unit, "0" * 32, outputs, {}, 1.0, "h", "cpu", 1, 1, "w"))


def start(run: Path, *, rehash: bool = False) -> list[str]:
    """Units that a driver finds done."""
    directory = RunDirectory(run)
    opened = Run(None, directory, directory.manifest)  # type: ignore[arg-type]  # nothing here reads a configuration
    with driven_runs({"": opened}, Console(file=io.StringIO()), rehash=rehash):
        return directory.manifest.units("evaluation")


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
        do_unit(directory.manifest, unit)
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
    do_unit(HeldManifest(run), "third")
    change_a_byte(output_of(run, "third"), same_time=True)
    assert start(run) == [*UNITS, "third"]


def test_a_noted_file_does_not_stand_for_another_content(run: Path) -> None:
    assert start(run) == [*UNITS]
    manifest, file = Manifest(run), output_of(run, "first")
    before = file.stat()
    file.write_bytes(b"x" * before.st_size)
    outputs = (OutputFile.describe(file, run=run),)
    [record, _] = manifest.records("evaluation")
    manifest.write(UnitRecord(**{**vars(record), "outputs": outputs}))
    change_a_byte(file, same_time=True)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert start(run) == ["second"]


@pytest.mark.parametrize(
    "torn", ['{"evaluation/first.bin": [655', "[]", "7", '{"evaluation/first.bin": 7}', '{"a": ["b"]}']
)
def test_a_torn_line_costs_a_hash(run: Path, torn: str) -> None:
    assert start(run) == [*UNITS]
    (run / NAME).write_text(torn)
    assert start(run) == [*UNITS]
    change_a_byte(output_of(run, "second"), same_time=True)
    assert start(run) == [*UNITS], "noted behind the torn line"
