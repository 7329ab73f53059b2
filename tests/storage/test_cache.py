import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from storage.cache import FORMAT_VERSION, Cache, DamagedRecord, UnitRecord, fingerprint
from storage.folder import Folder
from storage.output_file import OutputFile, describe_files
from tests.errors import names, raises


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def make_record(cache: Cache, content: bytes = b"x" * 110_000, **changes: Any) -> UnitRecord:
    assert isinstance(cache.location, Path)
    of, attempt = fingerprint({"seed": 1}), changes.get("attempt", "1" * 16)
    folder = cache.location / "evaluation" / of / attempt
    folder.mkdir(parents=True)
    (folder / "video.bin").write_bytes(content)
    record = UnitRecord(
        stage="evaluation",
        unit="prompt-0003",
        fingerprint=of,
        attempt=attempt,
        outputs=describe_files(folder),
        result={"psnr_db": 31.5, "frames": [1, 2], "by_step": {10: "a", 9: "b"}},
        seconds=1.25,
        host="node-1",
        device="cuda:0",
        peak_memory_bytes=2**35,
        tries=2,
        worker="evaluation-0",
    )
    return dataclasses.replace(record, **changes)


def output(cache: Cache, record: UnitRecord) -> Path:
    assert isinstance(cache.location, Path)
    return cache.location / record.key / str(record.attempt) / record.outputs[0].path


def create(cache: Cache, record: UnitRecord) -> UnitRecord:
    return cache.create(record, Folder(Path("no run")))


def problems(cache: Cache, record: UnitRecord, *, deep: bool) -> list[str]:
    return cache.problems(record, Folder(Path("no run")), deep=deep)


def test_record_round_trip(cache: Cache, tmp_path: Path) -> None:
    record = make_record(cache)
    assert cache.read("evaluation", record.fingerprint) is None
    assert create(cache, record) == record
    back = cache.read("evaluation", record.fingerprint)
    assert back is not None
    assert back.result == {"psnr_db": 31.5, "frames": [1, 2], "by_step": {"10": "a", "9": "b"}}
    assert dataclasses.replace(back, result={}) == dataclasses.replace(record, result={})
    assert problems(cache, back, deep=True) == []
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == [f"cache/{record.key}/{record.attempt}/video.bin", f"cache/{record.key}/record.json"]


def test_the_first_record_stands_and_readers_see_its_attempt_alone(cache: Cache) -> None:
    first, second = (
        make_record(cache, content, attempt=name) for name, content in (("1" * 16, b"one"), ("2" * 16, b"other"))
    )
    assert create(cache, first) == first
    assert create(cache, second).outputs == first.outputs
    found = cache.read("evaluation", first.fingerprint)
    assert found is not None
    assert found.attempt == first.attempt
    assert list(cache.dead_attempts()) == [f"{second.key}/{second.attempt}"]
    cache.remove(first.stage, first.fingerprint)
    assert create(cache, second) == second
    assert list(cache.dead_attempts()) == [f"{first.key}/{first.attempt}"]


def test_a_checkpoint_s_record_is_that_of_the_run_that_has_it(cache: Cache, tmp_path: Path) -> None:
    """Its files lie in the run: of one fingerprint two runs may have other bytes, as of another version of a library."""
    for content in (b"one", b"one", b"other"):
        folder = tmp_path / "run" / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.bin").write_bytes(content)
        outputs = describe_files(folder, base=tmp_path / "run")
        record = UnitRecord("assembly", "rtn", "f" * 32, None, outputs, {}, 1.0, "h", "cpu", 0, 1, "w")
        assert cache.create(record, Folder(tmp_path / "run")) == record
        assert cache.read("assembly", "f" * 32) == record


def test_what_no_driver_has_put_there_is_named_and_never_removed(tmp_path: Path) -> None:
    entry = Path("trajectories") / fingerprint({"a": 1})
    for folder in (
        "photos/2020/summer",
        "run/cache/trajectories",
        "run/checkpoint/vae",
        entry / "notes",
        entry / ("0" * 16),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_bytes(b"a")
    (tmp_path / "letter.txt").write_text("dear")
    cache = Cache(tmp_path)
    assert cache.foreign() == ["letter.txt", "photos/2020", "run/cache", "run/checkpoint"]
    before = set(tmp_path.rglob("*"))
    cache.sweep()
    dead = tmp_path / entry / ("0" * 16)
    assert before - set(tmp_path.rglob("*")) == {dead, dead / "file"}


def test_a_unit_without_its_outputs_is_not_done(cache: Cache) -> None:
    record = make_record(cache)
    output(cache, record).unlink()
    with raises(ValueError, "evaluation/prompt-0003", "video.bin", "missing"):
        create(cache, record)
    assert cache.read("evaluation", record.fingerprint) is None


def test_missing_and_damaged_outputs(cache: Cache) -> None:
    record = make_record(cache)
    path = output(cache, record)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    [problem] = problems(cache, record, deep=False)
    assert names(problem, "video.bin", 109999, 110000)
    path.write_bytes(b"X" + whole[1:])
    assert problems(cache, record, deep=False) == []
    [problem] = problems(cache, record, deep=True)
    assert names(problem, "video.bin", "SHA-256")


def test_small_outputs_are_hashed_always(cache: Cache) -> None:
    record = make_record(cache, b"{ }")
    output(cache, record).write_bytes(b"{!}")
    [problem] = problems(cache, record, deep=False)
    assert names(problem, "video.bin", "SHA-256")


def test_output_that_links_out_of_the_cache(cache: Cache, tmp_path: Path) -> None:
    record = make_record(cache)
    path = output(cache, record)
    path.rename(tmp_path / "outside.bin")
    path.symlink_to(tmp_path / "outside.bin")
    (problem,) = problems(cache, record, deep=True)
    assert names(problem, record.outputs[0].path, "link")


def test_every_flipped_bit_of_a_record_is_found(cache: Cache) -> None:
    record = create(cache, make_record(cache))
    path = output(cache, record).parents[1] / "record.json"
    raw, stored = path.read_bytes(), cache.read("evaluation", record.fingerprint)
    for position in range(0, len(raw), 3):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = cache.read("evaluation", record.fingerprint)
        except ValueError as error:
            message = str(error)
        else:
            assert found == stored  # white space turned into other white space
            continue
        assert str(path) in message


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"{}", b'{"format_version": 2}', b"\xff\xfe"])
def test_what_is_no_record_is_named_with_the_way_out(cache: Cache, content: bytes) -> None:
    cache.place.put("s/f/record.json", content)
    with raises(DamagedRecord, f"{cache.location}/s/f/record.json", "delete"):
        cache.read("s", "f")
    cache.remove("s", "f")
    cache.remove("s", "f")
    assert cache.read("s", "f") is None


def test_record_of_another_unit_is_refused(cache: Cache) -> None:
    record = create(cache, make_record(cache))
    cache.place.put("evaluation/other/record.json", cache.place.read(f"{record.key}/record.json"))
    with raises(DamagedRecord, "evaluation/other", record.fingerprint):
        cache.read("evaluation", "other")


def test_newer_record_is_not_damage(cache: Cache) -> None:
    record = create(cache, make_record(cache))
    path = output(cache, record).parents[1] / "record.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format_version": FORMAT_VERSION + 1, "new": 1}))
    with raises(ValueError, path, f"format {FORMAT_VERSION + 1}", FORMAT_VERSION) as caught:
        cache.read("evaluation", record.fingerprint)
    assert not isinstance(caught.value, DamagedRecord)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "-x", "a b", "a\n", "x" * 201])
def test_names_that_could_leave_the_cache_are_refused(cache: Cache, name: str) -> None:
    with raises(ValueError, "fingerprint name", repr(name)):
        cache.read("stage", name)
    with raises(ValueError, "stage name", repr(name)):
        cache.read(name, "f")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../b", "", "a\0b"])
def test_output_paths_stay_inside_the_run(path: str) -> None:
    with raises(ValueError, "output path", repr(path)):
        OutputFile(path, 1, "0" * 64)


def test_fingerprint_is_of_the_content() -> None:
    assert fingerprint({"a": 1, "b": [1.5, None]}) == fingerprint({"b": (1.5, None), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.0})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert fingerprint({10: 1, 9: 2}) == fingerprint({"9": 2, "10": 1})  # type: ignore[dict-item]
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e"
    with raises(ValueError, "JSON"):
        fingerprint({"a": float("nan")})
    with pytest.raises(TypeError):
        fingerprint({"a": Path("x")})
