"""What runs and caches need of the place where they lie: one class of tests, a folder and a bucket."""

import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.arrays import array_bytes
from storage.cache import Cache, DamagedRecord
from storage.line_log import open_log, read_log
from storage.location import Location, StoreUrl, local_path, parse_location
from storage.lock import driver_of
from storage.open_place import open_place
from storage.place import Place
from storage.recorded_outputs import DamagedArray
from storage.run_directory import ListedUnit, RunConfigMismatch, RunDirectory
from tests.errors import names, raises
from tests.s3_server import new_prefix
from tests.storage.exclusive_writer import put_once
from tests.storage.stores import U, done, record_of, unit_store

LARGE = 20 * 2**20


@pytest.fixture(params=["folder", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Where a new run may lie."""
    if request.param == "folder":
        return tmp_path / "run+=(1)"
    request.getfixturevalue("s3")
    return parse_location(new_prefix("run+=(1)"))


@pytest.fixture
def place(location: Location) -> Place:
    return open_place(location)


class TestPlace:
    def test_files_are_whole_or_absent(self, place: Place) -> None:
        with pytest.raises(FileNotFoundError):
            place.read("a/b.json")
        with pytest.raises(FileNotFoundError):
            place.stat("a/b.json")
        assert place.names("a") == place.subfolders("a") == []
        assert place.files() == []
        place.put("a/b.json", b"first")
        before = place.stat("a/b.json")
        assert place.stat("a/b.json") == before
        place.put("a/b.json", b"other")
        assert place.stat("a/b.json") != before
        assert place.read("a/b.json") == b"other"
        assert place.checksum("a/b.json") == hashlib.sha256(b"other").hexdigest()
        place.put("a/c/d.json", b"")
        assert (place.names("a"), place.subfolders("a"), place.names()) == (["b.json"], ["c"], [])
        assert [(key, num_bytes) for key, num_bytes, _ in place.files("a")] == [("a/b.json", 5), ("a/c/d.json", 0)]
        with place.listed("a"):
            assert place.stat("a/b.json").num_bytes == 5
            assert place.read("a/b.json") == b"other"
            place.put("ab", b"beside the folder")
            assert place.stat("ab").num_bytes == 17
            with pytest.raises(FileNotFoundError):
                place.stat("a/c")
        for _ in range(2):
            place.remove("a/b.json")
            place.remove("a/c")
        assert place.names("a") == place.subfolders("a") == []

    def test_of_many_exclusive_writers_one_wins(self, place: Place) -> None:
        place.put("a/b", b"", exclusive=True)
        with multiprocessing.get_context("spawn").Pool(3) as pool:
            won = pool.starmap(put_once, [(str(place.location), f"writer {number}") for number in range(3)])
        assert sum(won) == 1
        assert place.read("config.json") == f"writer {won.index(True)}".encode()

    def test_a_large_file_is_published_whole(self, location: Location) -> None:
        data = np.random.default_rng(0).bytes(LARGE)
        with unit_store(location) as store:
            store.write_file(U + "b.safetensors", lambda path: path.write_bytes(data))
            record = store.cache.create(record_of(store), store.run)
        [output] = record.outputs
        assert (output.path, output.num_bytes) == ("b.safetensors", LARGE)
        key = f"{record.key}/{record.attempt}/{output.path}"
        assert output.checksum == store.cache.place.checksum(key) == hashlib.sha256(data).hexdigest()
        reader = unit_store(location, "v", u=record.fingerprint)
        assert reader.file(U + "b.safetensors").read_bytes() == data
        reader.close()

    def test_a_folder_loses_what_is_no_longer_in_it(self, place: Place, tmp_path: Path) -> None:
        def writer(name: str) -> None:
            def write(path: Path) -> None:
                (path / "vae").mkdir(parents=True)
                (path / "vae" / f"{name}.json").write_text(name)
                (path / "index.json").write_text(name)
                if name == "failing":
                    raise RuntimeError("the unit fails")

            found = place.put_folder("checkpoint", write, last="index.json")
            assert [output.path for output in found] == ["index.json", f"vae/{name}.json"]

        for name in ("old", "new"):
            writer(name)
        with raises(RuntimeError, "the unit fails"):
            writer("failing")
        assert [key for key, _, _ in place.files("checkpoint")] == ["checkpoint/index.json", "checkpoint/vae/new.json"]
        copy = open_place(f"{place.location}/checkpoint").copied(tmp_path / "scratch")
        assert (copy / "vae" / "new.json").read_text() == "new"

    def test_log_lines_come_back_in_order(self, location: Location) -> None:
        assert list(read_log(location, "logs/events.jsonl")) == []
        for driver in range(2):
            log = open_log(location, "logs/events.jsonl")
            for number in range(3):
                log.append(f"{driver} {number}")
        expected = [f"{driver} {number}" for driver in range(2) for number in range(3)]
        assert list(read_log(location, "logs/events.jsonl")) == expected

    def test_a_run_of_another_configuration_is_refused(self, location: Location) -> None:
        RunDirectory.open_or_create(location, {"a": 1}, {"commit": "1"})
        assert RunDirectory.open(location).config == {"a": 1}
        with raises(RunConfigMismatch, location, "a", 1, 2, "--update"):
            RunDirectory.open_or_create(location, {"a": 2}, {})
        run = RunDirectory.open_or_create(location, {"a": 2}, {"commit": "2"}, update=True)
        assert (run.config, run.provenance) == ({"a": 2}, {"commit": "2"})

    def test_somebody_elses_place_is_refused(self, place: Place) -> None:
        place.put("notes.txt", b"mine")
        with raises(ValueError, place.location, "notes.txt"):
            RunDirectory.open_or_create(place.location, {}, {})
        with raises(ValueError, place.location, "config.json"):
            RunDirectory.open(place.location)

    def test_a_driver_is_named_while_it_is_at_work(self, location: Location) -> None:
        run = RunDirectory.open_or_create(location, {}, {})
        for _ in range(2):
            assert driver_of(location).at_work is None
            with run.lock():
                assert "process" in (driver_of(location).at_work or "")
        assert driver_of(location).died is None

    def test_the_cache_is_found_where_it_is(self, location: Location, tmp_path: Path) -> None:
        caches = [None, location / "own", location.parent / "shared", tmp_path / "elsewhere" / "cache"]
        for cache in caches:
            run = RunDirectory.open_or_create(location, {}, {}, cache=cache)
            assert RunDirectory.open(run.location).cache.location == (cache or location / "cache")

    def test_listed_units_come_back(self, location: Location) -> None:
        run = RunDirectory.open_or_create(location, {}, {})
        assert run.units() == {}
        stages = {
            "selection": (ListedUnit("selection", "f" * 32, ("trajectories/a", "trajectories/b")),),
            "refinement": (),
        }
        run.write_units(stages)
        assert run.units() == stages
        run.place.put("units.json", b"{")
        with raises(ValueError, f"{location}/units.json"):
            run.units()

    def test_records_of_listed_units_are_read_and_the_damaged_ones_named(self, location: Location) -> None:
        run = RunDirectory.open_or_create(location, {}, {})
        made = {f"u{index}": done(location, f"u{index}", a=torch.zeros(2)) for index in range(20)}
        listed = [ListedUnit(name, record.fingerprint) for name, record in made.items()]
        run.write_units({"trajectories": (*listed, ListedUnit("later"), ListedUnit("open", "0" * 32))})
        run.cache.place.put(f"{made['u7'].key}/record.json", b"{}")
        found = run.records()
        assert list(found) == [("trajectories", name) for name in made]
        assert {name for (_, name), record in found.items() if record == made[name]} == made.keys() - {"u7"}
        assert isinstance(found["trajectories", "u7"], DamagedRecord)
        assert run.records("selection") == {}

    def test_damage_of_outputs_is_found(self, location: Location) -> None:
        record = done(location, "u", a=torch.arange(100_000, dtype=torch.float32))
        cache, run = Cache(location / "cache"), open_place(location)
        assert cache.problems(record, run, deep=True) == []
        data, metadata = (f"{record.key}/{record.attempt}/a/{file}" for file in ("c.0", "zarr.json"))
        content = bytearray(cache.place.read(data))
        content[1000] ^= 1
        cache.place.put(data, bytes(content))
        [problem] = cache.problems(record, run, deep=True)
        assert names(problem, data, "SHA-256")
        cache.place.put(data, bytes(content[:-1]))
        cache.place.remove(metadata)
        short, absent = cache.problems(record, run, deep=False)
        assert names(short, data, 400003, 400004)
        assert names(absent, metadata, "missing")
        cache.remove(record.stage, record.fingerprint)
        with raises(ValueError, "trajectories/u", data, 400003, 400004, metadata):
            cache.create(record, run)

    def test_arrays_come_back_with_every_checksum_verified(self, location: Location) -> None:
        tensor = torch.randn(9000, 2000).to(torch.bfloat16)
        record = done(location, "u", b=tensor, scalar=torch.tensor(2.5), empty=torch.zeros(0, 4))
        files = [output.path for output in record.outputs if output.path.startswith("b/")]
        assert files == ["b/c.0.0", "b/c.1.0", "b/c.2.0", "b/zarr.json"]
        assert sum(o.num_bytes for o in record.outputs if o.path in files) == array_bytes((9000, 2000), torch.bfloat16)
        store = unit_store(location, "v", u=record.fingerprint)
        assert store.shape(U + "b") == (9000, 2000)
        assert torch.equal(store.read(U + "b"), tensor)
        assert torch.equal(store.read(U + "b", rows=slice(2900, 3100)), tensor[2900:3100])
        assert store.read(U + "scalar") == 2.5
        assert store.read(U + "empty").shape == (0, 4)
        store.close()
        place, data = store.cache.place, f"{record.key}/{record.attempt}/b/c.0.0"
        content = bytearray(place.read(data))
        content[5_000_000] ^= 4
        place.put(data, bytes(content))
        with raises(DamagedArray, U + "b", "c.0.0"):
            store.read(U + "b")
        place.remove(data)
        with raises(DamagedArray, U + "b"):
            store.read(U + "b")
        store.close()

    def test_what_is_read_from_a_bucket_goes_with_the_unit(self, location: Location) -> None:
        record = done(location, "u", a=torch.ones(3))
        with unit_store(location, "v", u=record.fingerprint) as store:
            store.read(U + "a", rows=slice(0, 1))
            scratch = store._scratch
            assert (scratch is not None) == isinstance(location, StoreUrl)
        assert scratch is None or not scratch.exists()

    def test_the_same_objects_as_in_a_folder(self, location: Location, tmp_path: Path) -> None:
        here, there = (done(place, "u", y=torch.arange(12.0).reshape(3, 4)) for place in (tmp_path / "other", location))
        assert [(o.path, o.checksum) for o in here.outputs] == [(o.path, o.checksum) for o in there.outputs]


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
