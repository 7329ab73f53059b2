import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from storage.manifest import FORMAT_VERSION, DamagedRecord, Manifest, OutputFile, UnitRecord, fingerprint
from tests.errors import names, raises


def make_record(run: Path, unit: str = "prompt-0003", **changes: Any) -> UnitRecord:
    file = run / "evaluation" / f"{unit}.bin"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(unit.encode() * 10_000)
    record = UnitRecord(
        stage="evaluation",
        unit=unit,
        fingerprint=fingerprint({"seed": 1}),
        outputs=(OutputFile.describe(file, run=run),),
        result={"psnr_db": 31.5, "frames": [1, 2], "by_step": {10: "a", 9: "b"}},
        seconds=1.25,
        host="node-1",
        device="cuda:0",
        peak_memory_bytes=2**35,
        attempt=2,
        worker="evaluation-0",
    )
    return dataclasses.replace(record, **changes)


def test_record_round_trip(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    record = make_record(tmp_path)
    assert manifest.read("evaluation", "prompt-0003") is None
    assert manifest.records("evaluation") == ()
    manifest.write(record)
    back = manifest.read("evaluation", "prompt-0003")
    assert back is not None
    assert back.outputs == record.outputs
    assert back.result == {"psnr_db": 31.5, "frames": [1, 2], "by_step": {"10": "a", "9": "b"}}
    assert dataclasses.replace(back, result={}) == dataclasses.replace(record, result={})
    assert manifest.missing_or_damaged(back, deep=True) == []
    assert [path.name for path in tmp_path.glob("manifest/**/*") if path.is_file()] == ["prompt-0003.json"]


def test_records_are_sorted_and_removable(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    for unit in ("b", "a", "c.1"):
        manifest.write(make_record(tmp_path, unit))
    (tmp_path / "manifest/evaluation/.d.json.123.partial").write_bytes(b"{")
    assert [record.unit for record in manifest.records("evaluation")] == ["a", "b", "c.1"]
    manifest.remove("evaluation", "b")
    manifest.remove("evaluation", "never")
    assert [record.unit for record in manifest.records("evaluation")] == ["a", "c.1"]
    assert (tmp_path / "evaluation" / "b.bin").exists()


def test_a_unit_without_its_outputs_is_not_done(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    record = make_record(tmp_path)
    (tmp_path / record.outputs[0].path).unlink()
    with raises(ValueError, "evaluation/prompt-0003", "evaluation/prompt-0003.bin", "missing"):
        manifest.write(record)
    assert manifest.read("evaluation", "prompt-0003") is None


def test_missing_and_damaged_outputs(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    record = make_record(tmp_path)
    path = tmp_path / record.outputs[0].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    [problem] = manifest.missing_or_damaged(record, deep=False)
    assert names(problem, "evaluation/prompt-0003.bin", 109999, 110000)
    path.write_bytes(b"X" + whole[1:])
    assert manifest.missing_or_damaged(record, deep=False) == []
    [problem] = manifest.missing_or_damaged(record, deep=True)
    assert names(problem, "evaluation/prompt-0003.bin", "SHA-256")


def test_small_outputs_are_hashed_always(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_bytes(b"{ }")
    record = make_record(tmp_path, outputs=(OutputFile.describe(tmp_path / "zarr.json", run=tmp_path),))
    (tmp_path / "zarr.json").write_bytes(b"{!}")
    [problem] = Manifest(tmp_path).missing_or_damaged(record, deep=False)
    assert names(problem, "zarr.json", "SHA-256")


def test_output_that_links_out_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    record = make_record(run)
    path = run / record.outputs[0].path
    path.rename(tmp_path / "outside.bin")
    path.symlink_to(tmp_path / "outside.bin")
    (problem,) = Manifest(run).missing_or_damaged(record, deep=True)
    assert names(problem, record.outputs[0].path, "link")


def test_every_flipped_bit_of_a_record_is_found(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    record = make_record(tmp_path)
    manifest.write(record)
    path = tmp_path / "manifest/evaluation/prompt-0003.json"
    raw = path.read_bytes()
    stored = manifest.read("evaluation", "prompt-0003")
    for position in range(0, len(raw), 3):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = manifest.read("evaluation", "prompt-0003")
        except ValueError as error:
            message = str(error)
        else:
            assert found == stored  # white space turned into other white space
            continue
        assert str(path) in message


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"{}", b'{"format_version": 1}', b"\xff\xfe"])
def test_what_is_no_record_is_named_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest/s/u.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with raises(DamagedRecord, path, "delete") as caught:
        Manifest(tmp_path).read("s", "u")
    assert str(path) in str(caught.value)


def test_record_of_another_unit_is_refused(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.write(make_record(tmp_path, "a"))
    folder = tmp_path / "manifest/evaluation"
    (folder / "b.json").write_bytes((folder / "a.json").read_bytes())
    with raises(DamagedRecord, folder / "b.json", "evaluation/a"):
        manifest.records("evaluation")


def test_newer_record_is_not_damage(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.write(make_record(tmp_path, "a"))
    path = tmp_path / "manifest/evaluation/a.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format_version": FORMAT_VERSION + 1, "new": 1}))
    with raises(ValueError, path, "format 2", 1) as caught:
        manifest.read("evaluation", "a")
    assert not isinstance(caught.value, DamagedRecord)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "-x", "a b", "a\n", "x" * 201])
def test_names_that_could_leave_the_manifest_are_refused(tmp_path: Path, name: str) -> None:
    manifest = Manifest(tmp_path)
    with raises(ValueError, "unit name", repr(name)):
        manifest.read("stage", name)
    with raises(ValueError, "stage name", repr(name)):
        manifest.records(name)
    with raises(ValueError, "unit name", repr(name)):
        manifest.write(UnitRecord("stage", name, "", (), {}, 0.0, "h", "cpu", 0, 1, "w"))


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
