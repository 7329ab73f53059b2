"""Everything that can happen to an array's files is found, and the array named; no Zarr reader finds all of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from storage import zarr_layout
from storage.calibration_store import CalibrationStore, DamagedArray
from storage.manifest import Manifest, UnitRecord
from tests.errors import raises

SHAPES = {"scalar": (), "one chunk": (5, 17), "shard": (1021, 17)}
Damage = Callable[[Path], None]


def flip(fraction: float) -> Damage:
    def damage(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[min(len(raw) - 1, int(fraction * len(raw)))] ^= 0x10
        path.write_bytes(raw)

    return damage


def truncate(kept: Callable[[int], int]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: kept(path.stat().st_size)])

    return damage


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES: dict[str, Damage] = {
    "bit in the first byte": flip(0),
    "bit in the middle": flip(0.5),
    "bit near the end": flip(0.97),
    "bit in the last byte": flip(1),
    "half": truncate(lambda size: size // 2),
    "one byte short": truncate(lambda size: size - 1),
    "one byte long": lengthen,
    "zeroed": zero,
    "empty": truncate(lambda size: 0),
    "missing": Path.unlink,
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CalibrationStore:
    monkeypatch.setattr(zarr_layout, "INNER_CHUNK_BYTES", 1024)
    return CalibrationStore(tmp_path / "calibration.zarr")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["data", "zarr.json"])
@pytest.mark.parametrize("shape", SHAPES)
def test_damage_is_found_by_the_store_and_by_the_manifest(
    store: CalibrationStore, shape: str, file: str, damage: str
) -> None:
    tensor = torch.arange(1, 1 + torch.Size(SHAPES[shape]).numel()).reshape(SHAPES[shape]).to(torch.bfloat16)
    outputs = store.write("x/victim", tensor)
    store.write("x/other", tensor)
    output = outputs[0 if file == "data" else 1]
    record = UnitRecord(
        "activations", "u", "0" * 32, outputs, {}, 1.0, "host", "cpu", peak_memory_bytes=0, attempt=1, worker="w"
    )
    manifest = Manifest(store.root.parent)
    assert manifest.missing_or_damaged(record, deep=True) == []

    DAMAGES[damage](store.root.parent / output.path)

    with raises(DamagedArray, "x/victim") as caught:
        store.read("x/victim")
    assert caught.value.name == "x/victim"
    assert Path(output.path).name in str(caught.value) or "chunk" in caught.value.reason
    (problem,) = manifest.missing_or_damaged(record, deep=True)
    assert problem.startswith(output.path + ": ")
    assert torch.equal(store.read("x/other"), tensor)

    assert store.write("x/victim", tensor) == outputs
    assert torch.equal(store.read("x/victim"), tensor)
    assert manifest.missing_or_damaged(record, deep=True) == []


def test_a_window_finds_damage_in_the_chunks_that_it_touches(store: CalibrationStore) -> None:
    tensor = torch.arange(1021 * 17).reshape(1021, 17).to(torch.bfloat16)
    store.write("a", tensor)
    path = store.root / "a" / "c.0.0"
    raw = bytearray(path.read_bytes())
    raw[3 * (30 * 17 * 2 + 4) + 5] ^= 1
    path.write_bytes(raw)
    assert torch.equal(store.read("a", rows=slice(0, 90)), tensor[:90])
    assert torch.equal(store.read("a", rows=slice(120, 1021)), tensor[120:])
    for rows in (slice(119, 120), slice(80, 91), None):
        with raises(DamagedArray, "'a'", "chunk 3 of 35", 3072):
            store.read("a", rows=rows)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_non_finite_values_written_by_others_are_found(store: CalibrationStore, value: float) -> None:
    store.write("a", torch.ones(1021, 17))
    zarr.open_array(store.root / "a", mode="r+")[700, 2] = value
    with raises(DamagedArray, "'a'", "chunk 46 of 69"):
        store.read("a")


def test_a_deleted_data_file_is_zeros_to_zarr_and_an_error_here(store: CalibrationStore) -> None:
    store.write("a", torch.ones(1021, 17))
    (store.root / "a" / "c.0.0").unlink()
    assert not np.any(zarr.open_array(store.root / "a", mode="r")[...])
    with raises(DamagedArray, "'a'", "c.0.0", store.root / "a"):
        store.read("a")


def test_an_array_never_written_is_named(store: CalibrationStore) -> None:
    with raises(DamagedArray, "never/was", "zarr.json"):
        store.read("never/was")
