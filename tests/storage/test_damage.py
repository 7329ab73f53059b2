"""Everything that can happen to an array's files is found, and the array named; no Zarr reader finds all of it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import Crc32cCodec

from storage import zarr_array
from storage.calibration_store import CalibrationStore, DamagedArray
from storage.manifest import Manifest, UnitRecord
from storage.zarr_array import open_array, write_array
from tests.errors import raises

SHAPES = {"scalar": (), "one chunk": (5, 17), "chunks": (1021, 17)}
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
    monkeypatch.setattr(zarr_array, "CHUNK_BYTES", 8192)
    return CalibrationStore(tmp_path / "calibration.zarr")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["first data", "last data", "zarr.json"])
@pytest.mark.parametrize("shape", SHAPES)
def test_damage_is_found_by_the_store_and_by_the_manifest(
    store: CalibrationStore, shape: str, file: str, damage: str
) -> None:
    tensor = torch.arange(1, 1 + torch.Size(SHAPES[shape]).numel()).reshape(SHAPES[shape]).to(torch.bfloat16)
    outputs = store.write("x/victim", tensor)
    store.write("x/other", tensor)
    output = outputs[{"first data": 0, "last data": -2, "zarr.json": -1}[file]]
    record = UnitRecord(
        "activations", "u", "0" * 32, outputs, {}, 1.0, "host", "cpu", peak_memory_bytes=0, attempt=1, worker="w"
    )
    manifest = Manifest(store.root.parent)
    assert manifest.missing_or_damaged(record, deep=True) == []

    DAMAGES[damage](store.root.parent / output.path)

    with raises(DamagedArray, "x/victim") as caught:
        store.read("x/victim")
    assert caught.value.name == "x/victim"
    assert Path(output.path).name in str(caught.value)
    (problem,) = manifest.missing_or_damaged(record, deep=True)
    assert problem.startswith(output.path + ": ")
    assert torch.equal(store.read("x/other"), tensor)

    assert store.write("x/victim", tensor) == outputs
    assert torch.equal(store.read("x/victim"), tensor)
    assert manifest.missing_or_damaged(record, deep=True) == []


def test_a_window_finds_damage_in_the_chunks_that_it_touches(store: CalibrationStore) -> None:
    tensor = torch.arange(1021 * 17).reshape(1021, 17).to(torch.bfloat16)
    store.write("a", tensor)
    flip(0)(store.root / "a" / "c.1.0")
    (store.root / "a" / "c.3.0").unlink()
    assert torch.equal(store.read("a", rows=slice(0, 205)), tensor[:205])
    assert torch.equal(store.read("a", rows=slice(410, 615)), tensor[410:615])
    assert torch.equal(store.read("a", rows=slice(820, 1021)), tensor[820:])
    for file, rows in (("c.1.0", slice(409, 410)), ("c.1.0", slice(80, 206)), ("c.3.0", slice(600, 616))):
        with raises(DamagedArray, "'a'", file, store.root / "a"):
            store.read("a", rows=rows)
    with raises(DamagedArray, "'a'"):
        store.read("a")


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_non_finite_values_written_by_others_are_found(store: CalibrationStore, value: float) -> None:
    store.write("a", torch.ones(1021, 17))
    zarr.open_array(store.root / "a", mode="r+")[700, 2] = value
    with raises(DamagedArray, "'a'", 1, 17357, [700, 2]):
        store.read("a")


def test_a_deleted_chunk_is_zeros_to_zarr_and_an_error_here(store: CalibrationStore) -> None:
    store.write("a", torch.ones(1021, 17))
    (store.root / "a" / "c.3.0").unlink()
    assert np.any(zarr.open_array(store.root / "a", mode="r")[...] == 0)
    with raises(DamagedArray, "'a'", "c.3.0", store.root / "a"):
        store.read("a")


def test_an_array_never_written_is_named(store: CalibrationStore) -> None:
    with raises(DamagedArray, "never/was", "zarr.json"):
        store.read("never/was")


class TestShards:
    """Arrays as earlier versions wrote them: all chunks in one file, with an index."""

    @pytest.fixture
    def tensor(self, store: CalibrationStore) -> torch.Tensor:
        tensor = torch.arange(1, 1 + 1021 * 17).reshape(1021, 17).to(torch.bfloat16)
        store.write("x/other", tensor)
        array = zarr.create_array(
            store.root / "x/victim",
            shape=(1021, 17),
            dtype="uint16",
            chunks=(30, 17),
            shards=(35 * 30, 17),
            filters=None,
            compressors=Crc32cCodec(),
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            attributes={"logical_dtype": "bfloat16"},
        )
        array[...] = tensor.view(torch.uint16).numpy()
        document = json.loads((store.root / "x/victim/zarr.json").read_bytes())
        array.update_attributes({"metadata_crc32c": zarr_array._checksum(document)})
        return tensor

    @pytest.mark.parametrize(
        "rows", [None, slice(0, 1), slice(29, 31), slice(1020, 1021), slice(17, 1000), slice(8, 8)]
    )
    def test_are_read(self, store: CalibrationStore, tensor: torch.Tensor, rows: slice | None) -> None:
        assert sorted(file.name for file in (store.root / "x/victim").iterdir()) == ["c.0.0", "zarr.json"]
        assert torch.equal(store.read("x/victim", rows=rows), tensor[rows or slice(None)])

    @pytest.mark.parametrize("rows", [None, slice(17, 1000), slice(500, 550)])
    @pytest.mark.parametrize("damage", [damage for damage in DAMAGES if "bit" not in damage])
    def test_a_damaged_file_is_found(
        self, store: CalibrationStore, tensor: torch.Tensor, damage: str, rows: slice | None
    ) -> None:
        DAMAGES[damage](store.root / "x/victim/c.0.0")
        with raises(DamagedArray, "x/victim", "c.0.0"):
            store.read("x/victim", rows=rows)
        assert torch.equal(store.read("x/other", rows=rows), tensor[rows or slice(None)])

    @pytest.mark.parametrize("place", [0, 12_345, 35 * 1024 + 3, -5, -1])
    def test_a_flipped_bit_of_data_checksums_or_index_is_found(
        self, store: CalibrationStore, tensor: torch.Tensor, place: int
    ) -> None:
        file = store.root / "x/victim/c.0.0"
        raw = bytearray(file.read_bytes())
        raw[place] ^= 4
        file.write_bytes(raw)
        with raises(DamagedArray, "x/victim", "c.0.0"):
            store.read("x/victim")


@pytest.mark.parametrize("shape", [(), (7, 3), (3000, 4096)])
def test_every_flipped_bit_and_every_cut_of_the_metadata_is_found(tmp_path: Path, shape: tuple[int, ...]) -> None:
    raw = metadata(tmp_path, shape)
    for position in range(len(raw)):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[position] ^= 1 << bit
            with raises(ValueError, "zarr.json"):
                open_array(bytes(damaged), _no_file)
        with raises(ValueError, "zarr.json"):
            open_array(raw[:position], _no_file)
    assert open_array(raw, _no_file).shape == shape


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b"null", b"\x00" * 900, b'{"attributes": []}', b'{"attributes": {}}']
)
def test_what_is_no_metadata_is_refused(raw: bytes) -> None:
    with raises(ValueError, "zarr.json"):
        open_array(raw, _no_file)


def test_metadata_with_another_shape_is_refused_by_its_checksum(tmp_path: Path) -> None:
    """5,001 rows would fit the same chunks: only the checksum tells."""
    document = json.loads(metadata(tmp_path, (5000, 4096)))
    assert document["chunk_grid"]["configuration"]["chunk_shape"][0] * 3 >= 5001
    document["shape"][0] = 5001
    with raises(ValueError, "zarr.json", "checksum"):
        open_array(json.dumps(document, indent=2).encode(), _no_file)


def metadata(folder: Path, shape: tuple[int, ...]) -> bytes:
    write_array(folder, torch.zeros(shape, dtype=torch.bfloat16))
    return (folder / "zarr.json").read_bytes()


def _no_file(name: str) -> bytes:
    raise AssertionError(f"{name} is not to be read")
