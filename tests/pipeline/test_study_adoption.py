"""Units that the runs of a study take over from each other, and the locks of all of them."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.context import Run
from pipeline.runner import locked
from pipeline.study.adoption import adopt
from storage.manifest import Manifest, OutputFile, UnitRecord
from storage.run_directory import RunDirectory, RunLocked
from tests.errors import raises
from tests.s3_server import new_prefix


def make_run(path: Path) -> Run:
    directory = RunDirectory.open_or_create(path, {}, {})
    return Run(None, directory, Manifest(directory))  # type: ignore[arg-type]  # adoption reads no configuration


def finish(run: Run, unit: str, contents: dict[str, bytes], *, fingerprint: str = "f" * 32) -> UnitRecord:
    outputs = []
    for name, content in contents.items():
        path = run.directory.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        outputs.append(OutputFile.describe(path, run=run.directory.path))
    record = UnitRecord(
        stage="assembly", unit=unit, fingerprint=fingerprint, outputs=tuple(outputs), result={"a": 1}, seconds=2.0,
        host="h", device="cpu", peak_memory_bytes=3, attempt=1, worker="worker-0",
    )  # fmt: skip
    run.manifest.write(record)
    return record


CONTENTS = {"checkpoint/x/a.bin": b"1" * 100_001, "checkpoint/b.json": b"{}", "evaluation/film.mp4": b""}


def test_adopted_files_are_the_source_s_and_stay_when_it_writes_new_ones(tmp_path: Path) -> None:
    source, taker = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    record = finish(source, "u", CONTENTS)
    finish(taker, "u", {"checkpoint/b.json": b"older", "checkpoint/gone.bin": b"older"}, fingerprint="e" * 32)
    assert adopt(record, source=source, source_label="seed-0/a", taker=taker) == []
    assert adopt(record, source=source, source_label="seed-0/a", taker=taker) == [], "once more changes nothing"
    adopted = taker.manifest.read("assembly", "u")
    assert adopted is not None
    assert adopted.worker == "adopted from seed-0/a"
    assert (adopted.fingerprint, adopted.outputs, adopted.seconds) == (record.fingerprint, record.outputs, 2.0)
    assert taker.manifest.missing_or_damaged(adopted, deep=True) == []
    for name, content in CONTENTS.items():
        first, second = (run.directory.path / name for run in (source, taker))
        assert second.read_bytes() == content
        assert first.samefile(second)
    assert not (taker.directory.path / "checkpoint/gone.bin").exists(), "the older configuration's file"
    assert not list(taker.directory.path.rglob("*.partial"))


def test_what_a_run_writes_anew_leaves_the_other_run_s_files(tmp_path: Path) -> None:
    import torch

    source, taker = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    store = source.directory.calibration_store
    outputs = store.write("trajectories/p/latents", torch.arange(7.0))
    record = UnitRecord("trajectories", "p", "f" * 32, outputs, {}, 1.0, "h", "cpu", 1, 1, "w")
    source.manifest.write(record)
    assert adopt(record, source=source, source_label="a", taker=taker) == []
    groups = [taker.directory.path / "calibration.zarr" / name / "zarr.json" for name in ("", "trajectories")]
    assert all(group.is_file() for group in groups), "other readers find the store"
    store.write("trajectories/p/latents", torch.zeros(7))
    assert torch.equal(taker.directory.calibration_store.read("trajectories/p/latents"), torch.arange(7.0))
    assert taker.manifest.missing_or_damaged(record, deep=True) == []


def test_a_damaged_source_is_not_adopted(tmp_path: Path) -> None:
    source, taker = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    record = finish(source, "u", CONTENTS)
    (source.directory.path / "checkpoint/x/a.bin").write_bytes(b"1" * 99)
    [problem] = adopt(record, source=source, source_label="a", taker=taker)
    assert "99 bytes, 100001 expected" in problem
    (source.directory.path / "checkpoint/x/a.bin").unlink()
    [problem] = adopt(record, source=source, source_label="a", taker=taker)
    assert "missing" in problem
    assert taker.manifest.read("assembly", "u") is None
    assert not (taker.directory.path / "checkpoint").exists()


def test_files_of_another_device_are_copied_and_checked(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev or not os.access(other, os.W_OK):
        pytest.skip("needs a second file system at /dev/shm")
    far = other / f"reelquant-study-{os.getpid()}"
    try:
        source, taker = make_run(far), make_run(tmp_path / "b")
        record = finish(source, "u", CONTENTS)
        assert adopt(record, source=source, source_label="a", taker=taker) == []
        assert taker.manifest.missing_or_damaged(record, deep=True) == []
        taker.manifest.remove("assembly", "u")
        (taker.directory.path / "checkpoint/x/a.bin").unlink()
        (far / "checkpoint/x/a.bin").write_bytes(b"2" * 100_001)
        [problem] = adopt(record, source=source, source_label="a", taker=taker)
        assert "SHA-256" in problem
        assert taker.manifest.read("assembly", "u") is None
    finally:
        shutil.rmtree(far, ignore_errors=True)


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_all_runs_are_locked_or_none(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "bucket":
        request.getfixturevalue("s3")
    place = str(tmp_path) if kind == "folder" else new_prefix("study")
    runs = [RunDirectory.open_or_create(f"{place}/{number}", {}, {}) for number in range(4)]
    with locked(runs):
        assert all(run.store.driver().at_work for run in runs)
    with locked(runs[2:3]), raises(RunLocked, f"{place}/2", os.getpid()), locked(runs):
        pass
    assert not any(run.store.driver().at_work or run.store.driver().died for run in runs)
    with locked(runs):
        pass
