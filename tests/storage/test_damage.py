"""Everything that can happen to an array's files is found, and the array named; no Zarr reader finds all of it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from storage import arrays
from storage.arrays import read_array
from storage.recorded_outputs import DamagedArray
from storage.unit_store import UnitStore
from tests.errors import raises
from tests.storage.stores import done, unit_store

SHAPES = {"scalar": (), "one chunk": (5, 17), "chunks": (1021, 17)}
A = "trajectories/u/a"
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
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 8192)
    return tmp_path / "run"


def written(run: Path, tensor: torch.Tensor) -> tuple[Path, UnitStore]:
    """Folder of the array `trajectories/u/a` of a unit that is done, and the store of one that reads it."""
    record = done(run, "u", a=tensor)
    store = unit_store(run, "v", u=record.fingerprint)
    return run / "cache" / record.key / str(record.attempt) / "a", store


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["first data", "last data", "zarr.json"])
@pytest.mark.parametrize("shape", SHAPES)
def test_damage_is_found_by_the_reader_and_by_the_check(run: Path, shape: str, file: str, damage: str) -> None:
    tensor = torch.arange(1, 1 + torch.Size(SHAPES[shape]).numel()).reshape(SHAPES[shape]).to(torch.bfloat16)
    victim, other = done(run, "u", x=tensor), done(run, "other", x=tensor)
    store = unit_store(run, "v", u=victim.fingerprint, other=other.fingerprint)
    outputs = [output for output in victim.outputs if output.path.startswith("x/")]
    output = outputs[{"first data": 0, "last data": -2, "zarr.json": -1}[file]]
    assert store.cache.problems(victim, store.run, deep=True) == []

    DAMAGES[damage](run / "cache" / victim.key / str(victim.attempt) / output.path)

    with raises(DamagedArray, "trajectories/u/x") as caught:
        store.read("trajectories/u/x")
    assert caught.value.name == "trajectories/u/x"
    assert Path(output.path).name in str(caught.value)
    (problem,) = store.cache.problems(victim, store.run, deep=True)
    assert problem.startswith(f"{victim.key}/{victim.attempt}/{output.path}: ")
    assert torch.equal(store.read("trajectories/other/x"), tensor)

    store.cache.remove(victim.stage, victim.fingerprint)
    again = done(run, "u", x=tensor)
    assert again.outputs == victim.outputs
    assert again.attempt != victim.attempt
    assert torch.equal(unit_store(run, "v", u=victim.fingerprint).read("trajectories/u/x"), tensor)


def test_a_window_finds_damage_in_the_chunks_that_it_touches(run: Path) -> None:
    tensor = torch.arange(1021 * 17).reshape(1021, 17).to(torch.bfloat16)
    folder, store = written(run, tensor)
    flip(0)(folder / "c.1.0")
    truncate(lambda size: 0)(folder / "c.3.0")
    assert torch.equal(store.read(A, rows=slice(0, 205)), tensor[:205])
    assert torch.equal(store.read(A, rows=slice(410, 615)), tensor[410:615])
    assert torch.equal(store.read(A, rows=slice(820, 1021)), tensor[820:])
    for file, rows in (("c.1.0", slice(409, 410)), ("c.1.0", slice(80, 206)), ("c.3.0", slice(600, 616))):
        with raises(DamagedArray, A, file, folder):
            store.read(A, rows=rows)
    with raises(DamagedArray, A):
        store.read(A)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_non_finite_values_written_by_others_are_found(run: Path, value: float) -> None:
    folder, store = written(run, torch.ones(1021, 17))
    zarr.open_array(folder, mode="r+")[700, 2] = value
    with raises(DamagedArray, A, 1, 17357, [700, 2]):
        store.read(A)


def test_a_deleted_chunk_is_zeros_to_zarr_and_an_error_here(run: Path) -> None:
    folder, store = written(run, torch.ones(1021, 17))
    (folder / "c.3.0").unlink()
    assert np.any(zarr.open_array(folder, mode="r")[...] == 0)
    with raises(FileNotFoundError, "c.3.0"):
        read_array(folder)
    with raises(DamagedArray, A, folder / "c.3.0"):
        store.read(A)


def test_an_array_never_written_is_named(run: Path) -> None:
    _, store = written(run, torch.ones(3))
    with raises(DamagedArray, "trajectories/u/never/was"):
        store.read("trajectories/u/never/was")


def test_metadata_with_another_shape_is_no_array(run: Path) -> None:
    """1,022 rows would fit the same chunks: only the record's SHA-256 tells."""
    folder, store = written(run, torch.zeros(1021, 17))
    document = json.loads((folder / "zarr.json").read_bytes())
    document["shape"][0] = 1022
    (folder / "zarr.json").write_text(json.dumps(document, indent=2))
    assert read_array(folder).shape == (1022, 17)
    for attempt in (store.read, store.shape):
        with raises(DamagedArray, A, "zarr.json"):
            attempt(A)
