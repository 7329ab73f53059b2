"""What a run needs of the place where it lies: one class of tests, a folder and a bucket."""

import hashlib
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.calibration_store import CalibrationStore, DamagedArray
from storage.location import StoreUrl, local_path, parse_location
from storage.manifest import DamagedRecord, HeldManifest, Manifest, UnitRecord
from storage.open_store import open_store
from storage.run_directory import RunConfigMismatch, RunDirectory, RunLocked
from storage.run_store import RunStore
from storage.zarr_array import array_bytes
from tests.errors import names, raises
from tests.s3_server import new_prefix
from tests.storage.exclusive_writer import put_once

LARGE = 20 * 2**20


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new run may lie."""
    if request.param == "folder":
        return str(tmp_path / "run")
    request.getfixturevalue("s3")
    return new_prefix("run")


@pytest.fixture
def store(place: str) -> RunStore:
    return open_store(place)


def record(directory: RunDirectory, unit: str, tensor: torch.Tensor) -> UnitRecord:
    outputs = directory.calibration_store.write(f"x/{unit}", tensor)
    return UnitRecord("trajectories", unit, "f" * 32, outputs, {"n": 1}, 1.0, "host", "cpu", 1, 1, "w")


class TestRunStore:
    def test_files_are_whole_or_absent(self, store: RunStore) -> None:
        with pytest.raises(FileNotFoundError):
            store.read("a/b.json")
        with pytest.raises(FileNotFoundError):
            store.stat("a/b.json")
        assert store.names("a") == store.subfolders("a") == []
        written = store.put("a/b.json", b"first")
        assert store.put("a/b.json", b"second").checksum != written.checksum
        assert store.read("a/b.json") == b"second"
        assert store.stat("a/b.json").num_bytes == 6
        assert store.checksum("a/b.json") == hashlib.sha256(b"second").hexdigest()
        store.put("a/c/d.json", b"")
        assert (store.names("a"), store.subfolders("a"), store.names("")) == (["b.json"], ["c"], [])
        assert store.num_bytes() == 6
        store.remove("a/b.json")
        store.remove("a/b.json")
        assert store.names("a") == []

    def test_identity_changes_with_the_content(self, store: RunStore) -> None:
        store.put("a", b"first")
        before = store.stat("a")
        assert store.stat("a") == before
        store.put("a", b"other")
        assert store.stat("a").identity != before.identity

    def test_of_many_exclusive_writers_one_wins(self, store: RunStore, place: str) -> None:
        store.put("a/b", b"", exclusive=True)
        with multiprocessing.get_context("spawn").Pool(3) as pool:
            won = pool.starmap(put_once, [(place, f"writer {number}") for number in range(3)])
        assert sum(won) == 1
        assert store.read("config.json") == f"writer {won.index(True)}".encode()

    def test_a_large_file_is_published_whole(self, store: RunStore) -> None:
        data = np.random.default_rng(0).bytes(LARGE)
        [output] = store.publish("blocks/m/b.safetensors", lambda path: path.write_bytes(data))
        assert (output.path, output.num_bytes) == ("blocks/m/b.safetensors", LARGE)
        assert output.checksum == store.checksum(output.path) == hashlib.sha256(data).hexdigest()
        with store.local_files([output.path]) as [copy]:
            assert copy.name == "b.safetensors"
            assert copy.read_bytes() == data

    def test_a_folder_loses_what_is_no_longer_in_it_and_its_index_comes_last(self, store: RunStore) -> None:
        def first(path: Path) -> None:
            (path / "vae").mkdir(parents=True)
            (path / "vae" / "old.json").write_text("old")
            (path / "index.json").write_text("1")

        def failing(path: Path) -> None:
            raise RuntimeError("the unit fails")

        store.publish("checkpoint", first, last="index.json")
        with raises(RuntimeError, "the unit fails"):
            store.publish("checkpoint", failing, last="index.json")
        copy = store.local_folder("checkpoint")
        assert store.local_folder("checkpoint") == copy
        assert sorted(p.relative_to(copy).as_posix() for p in copy.rglob("*.json")) == ["index.json", "vae/old.json"]

    def test_a_record_is_replaced_but_not_over_a_later_drivers(self, place: str) -> None:
        directory = RunDirectory.open_or_create(place, {}, {})
        manifest = directory.manifest
        first = record(directory, "u", torch.zeros(3))
        with directory.lock():
            manifest.write(first)
            manifest.write(first)
        with directory.lock():
            manifest.write(record(directory, "u", torch.ones(3)))
        found = manifest.read("trajectories", "u")
        assert found is not None
        assert found.outputs != first.outputs
        assert manifest.units("trajectories") == ["u"]

    def test_log_lines_come_back_in_order(self, place: str) -> None:
        directory = RunDirectory.open_or_create(place, {}, {})
        assert list(directory.store.read_log("logs", "events.jsonl")) == []
        for driver in range(2):
            with directory.lock():
                log = directory.store.open_log("logs", "events.jsonl")
                for number in range(3):
                    log.append(f"{driver} {number}")
                log.close()
        expected = [f"{driver} {number}" for driver in range(2) for number in range(3)]
        assert list(directory.store.read_log("logs", "events.jsonl")) == expected

    def test_the_second_driver_is_refused_by_name_and_the_next_takes_a_free_run(self, place: str) -> None:
        directory = RunDirectory.open_or_create(place, {}, {})
        assert directory.store.driver().at_work is None
        with directory.lock():
            assert "process" in (directory.store.driver().at_work or "")
            with raises(RunLocked, place, os.getpid()), directory.lock():
                pass
        with directory.lock():
            pass
        assert directory.store.driver().died is None

    def test_a_run_of_another_configuration_is_refused(self, place: str) -> None:
        RunDirectory.open_or_create(place, {"a": 1}, {"commit": "1"})
        assert RunDirectory.open(place).config == {"a": 1}
        with raises(RunConfigMismatch, place, "a", 1, 2, "--update"):
            RunDirectory.open_or_create(place, {"a": 2}, {})
        run = RunDirectory.open_or_create(place, {"a": 2}, {"commit": "2"}, update=True)
        assert (run.config, run.provenance) == ({"a": 2}, {"commit": "2"})

    def test_somebody_elses_place_is_refused(self, store: RunStore, place: str) -> None:
        store.put("notes.txt", b"mine")
        with raises(ValueError, place, "notes.txt"):
            RunDirectory.open_or_create(place, {}, {})
        with raises(ValueError, place, "config.json"):
            RunDirectory.open(place)

    def test_damage_of_outputs_is_found(self, store: RunStore, place: str) -> None:
        directory = RunDirectory.open_or_create(place, {}, {})
        done = record(directory, "u", torch.arange(100_000, dtype=torch.float32))
        assert directory.manifest.missing_or_damaged(done, deep=True) == []
        data, metadata = done.outputs
        content = bytearray(store.read(data.path))
        content[1000] ^= 1
        store.put(data.path, bytes(content))
        [problem] = directory.manifest.missing_or_damaged(done, deep=True)
        assert names(problem, data.path, "SHA-256")
        store.put(data.path, bytes(content[:-1]))
        store.remove(metadata.path)
        short, absent = directory.manifest.missing_or_damaged(done, deep=False)
        assert names(short, data.path, 400003, 400004)
        assert names(absent, metadata.path, "missing")
        with raises(ValueError, "trajectories/u", data.path, 400003, 400004, metadata.path):
            directory.manifest.write(done)

    @pytest.mark.parametrize("largest_copy", [None, 1000])
    def test_files_of_another_run_are_had_without_being_written(
        self, place: str, largest_copy: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if largest_copy is not None:
            monkeypatch.setattr("storage.s3_store.LARGEST_COPY_BYTES", largest_copy)
        source, taker = (RunDirectory.open_or_create(f"{place}-{name}+=(1)", {}, {}) for name in ("a", "b"))
        tensor = torch.arange(100_000, dtype=torch.float32)
        done = record(source, "u", tensor)
        adopted = replace(done, outputs=taker.store.adopt(done.outputs, source.store))
        assert [o.checksum for o in adopted.outputs] == [o.checksum for o in done.outputs]
        taker.calibration_store.adopted(adopted.outputs)
        taker.manifest.write(adopted)
        assert taker.manifest.missing_or_damaged(adopted, deep=True) == []
        assert taker.store.names("calibration.zarr/x") == ["zarr.json"]
        record(source, "u", torch.zeros(100_000))
        source.store.remove("calibration.zarr/zarr.json")
        assert torch.equal(taker.calibration_store.read("x/u"), tensor)
        if taker.store.stat(adopted.outputs[0].path).e_tag is not None:
            with raises(ValueError, done.outputs[0].path, "SHA-256"):
                taker.store.adopt(done.outputs, source.store)
            again = record(source, "u", tensor)  # the same content in an object of another e_tag
            assert taker.store.adopt([replace(o, e_tag="other") for o in again.outputs], source.store)

    def test_a_damaged_record_is_named(self, store: RunStore, place: str) -> None:
        manifest = Manifest(place)
        store.put("manifest/trajectories/u.json", b"{}")
        with raises(DamagedRecord, f"{place}/manifest/trajectories/u.json"):
            manifest.read("trajectories", "u")
        manifest.remove("trajectories", "u")
        assert manifest.read("trajectories", "u") is None

    def test_a_stage_s_records_are_read_together_and_the_damaged_ones_named(self, store: RunStore, place: str) -> None:
        directory = RunDirectory.open_or_create(place, {}, {})
        done = [replace(record(directory, f"u{index}", torch.zeros(2)), result={"n": index}) for index in range(20)]
        for one in done:
            directory.manifest.write(one)
        store.put("manifest/trajectories/u7.json", b"{}")
        found = directory.manifest.read_stage("trajectories")
        assert list(found) == sorted(one.unit for one in done)
        assert [found[one.unit] for one in done if one.unit != "u7"] == [one for one in done if one.unit != "u7"]
        assert isinstance(found["u7"], DamagedRecord)
        with raises(DamagedRecord, "u7.json"):
            directory.manifest.records("trajectories")
        directory.manifest.remove("trajectories", "u7")
        assert len(directory.manifest.records("trajectories")) == 19
        assert directory.manifest.read_stage("nothing") == {}

    def test_a_driver_reads_a_record_once_and_sees_what_it_writes(self, store: RunStore, place: str) -> None:
        directory = RunDirectory.open_or_create(place, {}, {})
        held = HeldManifest(place)
        assert held.read("trajectories", "u") is None
        first = record(directory, "u", torch.zeros(3))
        held.write(first)
        assert held.read_stage("trajectories") == {"u": first}
        store.remove("manifest/trajectories/u.json")
        assert held.read("trajectories", "u") == first
        second = record(directory, "u", torch.ones(3))
        held.write(second)
        assert held.read("trajectories", "u") == second
        held.remove("trajectories", "u")
        assert held.read("trajectories", "u") is None

    def test_arrays_come_back_with_every_checksum_verified(self, store: RunStore, place: str) -> None:
        arrays = CalibrationStore(parse_location(place) / "calibration.zarr")
        tensor = torch.randn(9000, 2000).to(torch.bfloat16)
        outputs = arrays.write("a/b", tensor)
        arrays.write("scalar", torch.tensor(2.5))
        arrays.write("empty", torch.zeros(0, 4))
        assert [Path(output.path).name for output in outputs] == ["c.0.0", "c.1.0", "c.2.0", "zarr.json"]
        assert sum(output.num_bytes for output in outputs) == array_bytes((9000, 2000), torch.bfloat16)
        assert all(store.checksum(output.path) == output.checksum for output in outputs)
        assert arrays.shape("a/b") == (9000, 2000)
        assert torch.equal(arrays.read("a/b"), tensor)
        assert torch.equal(arrays.read("a/b", rows=slice(2900, 3100)), tensor[2900:3100])
        assert arrays.read("scalar") == 2.5
        assert arrays.read("empty").shape == (0, 4)
        with raises(ValueError, "'a'", "group"):
            arrays.write("a", tensor)
        with raises(ValueError, "'nan'", 2, 4, [1]):
            arrays.write("nan", torch.tensor([1.0, float("nan"), 2.0, float("nan")]))
        content = bytearray(store.read(outputs[0].path))
        content[5_000_000] ^= 4
        store.put(outputs[0].path, bytes(content))
        with raises(DamagedArray, "'a/b'", "c.0.0"):
            arrays.read("a/b")
        assert torch.equal(arrays.read("a/b", rows=slice(3000, 9000)), tensor[3000:])
        store.remove(outputs[0].path)
        with raises(DamagedArray, "'a/b'", "c.0.0"):
            arrays.read("a/b")
        arrays.write("a/b", tensor[:100])
        assert torch.equal(arrays.read("a/b"), tensor[:100])
        assert store.names("calibration.zarr/a/b") == ["c.0.0", "zarr.json"]

    def test_the_same_objects_as_in_a_folder(self, store: RunStore, place: str, tmp_path: Path) -> None:
        folder = CalibrationStore(tmp_path / "other" / "calibration.zarr")
        arrays = CalibrationStore(parse_location(place) / "calibration.zarr")
        for written in (folder, arrays):
            written.write("x/y", torch.arange(12.0).reshape(3, 4))
        for file in ("zarr.json", "x/zarr.json", "x/y/zarr.json", "x/y/c.0.0"):
            assert store.read(f"calibration.zarr/{file}") == (folder.root / file).read_bytes()


NO_LOCATIONS = (
    "s3://bucket",
    "s3://bucket/",
    "s3://bucket/../x",
    "s3:///x",
    "gs://bucket/x",
    "s3://B_/x",
    "s3://bucket/a//b",
)


def test_locations() -> None:
    url = parse_location("s3://bucket/a/b/")
    assert isinstance(url, StoreUrl)
    assert (str(url), url.name, str(url.parent), str(url / "c")) == (
        "s3://bucket/a/b",
        "b",
        "s3://bucket/a",
        "s3://bucket/a/b/c",
    )
    assert (url / "c/d").relative_to(url).as_posix() == "c/d"
    assert parse_location("a/b") == Path("a/b")
    for bad in NO_LOCATIONS:
        with raises(ValueError, bad):
            parse_location(bad)
    with raises(ValueError, "bucket/run", "AWS_ACCESS_KEY_ID") as caught:
        parse_location("s3://AKIA:wJalr@bucket/run")
    assert "wJalr" not in str(caught.value)
    with raises(ValueError, "s3://bucket/a/b", "studies link files"):
        local_path(url, why="studies link files")


def test_a_record_in_a_folder_has_no_trace_of_buckets(tmp_path: Path) -> None:
    directory = RunDirectory.open_or_create(tmp_path / "run", {}, {})
    directory.manifest.write(record(directory, "u", torch.zeros(3)))
    document = json.loads((directory.path / "manifest/trajectories/u.json").read_bytes())
    assert "epoch" not in document
    assert set(document["outputs"][0]) == {"path", "num_bytes", "checksum"}
