import contextlib
import hashlib
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from storage import arrays
from storage.arrays import CHUNK_BYTES, array_bytes, write_array
from storage.recorded_outputs import DamagedArray
from storage.unit_store import UnitStore
from tests.errors import names, raises
from tests.storage.stores import U, done, unit_store

ROOT = Path(__file__).resolve().parents[2]
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SHAPES = ((), (1,), (7, 3), (2, 3, 5, 1), (1021, 17), (0, 3), (4, 0), (100, 3, 2))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UnitStore]:
    """A store whose chunks are 8 KiB: small tensors take all paths."""
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 8192)
    with unit_store(tmp_path / "run") as opened:
        yield opened


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
    low, high = (0, 2) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def stored_values(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
def test_exact_here_and_in_zarr_python(store: UnitStore, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = make(shape, dtype)
    store.write(U + "a/b", tensor)

    back = store.read(U + "a/b")
    assert (back.shape, back.dtype) == (tensor.shape, dtype)
    assert bits(back) == bits(tensor)

    array = zarr.open_array(store.folder / "a/b", mode="r")
    assert array.shape == shape
    assert array.attrs["logical_dtype"] == str(dtype).removeprefix("torch.")
    assert np.array_equal(array[...], stored_values(tensor))


@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.float32, torch.int64], ids=str)
def test_what_zarr_python_writes_is_read(store: UnitStore, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    store.write(U + "a", torch.full(shape, 1).to(dtype))
    tensor = make(shape, dtype, seed=1)
    array = zarr.open_array(store.folder / "a", mode="r+", config={"write_empty_chunks": True})
    array[...] = stored_values(tensor)
    assert bits(store.read(U + "a")) == bits(tensor)


@given(st.lists(st.integers(0, 40), max_size=4), st.sampled_from(FLOATS + INTEGERS))
def test_bytes_are_those_that_were_foretold(shape: list[int], dtype: torch.dtype) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", 1024)
        write_array(Path(folder), torch.zeros(shape, dtype=dtype))
        written = {file.name: file.stat().st_size for file in Path(folder).iterdir()}
        row = torch.Size(shape[1:]).numel() * dtype.itemsize
        assert array_bytes(tuple(shape), dtype) == sum(written.values())
        assert all(size <= max(1024, row) + 4 for name, size in written.items() if name.startswith("c"))


@pytest.mark.parametrize(
    ("shape", "num_rows", "num_chunks"), [((8192, 3072), 2048, 4), ((57600, 3072), 2619, 22), ((3, CHUNK_BYTES), 1, 3)]
)
def test_chunks_of_the_sizes_that_matter(shape: tuple[int, int], num_rows: int, num_chunks: int) -> None:
    """8,192 and 57,600 tokens of 3,072 bf16 channels: next to no padding; rows that are larger than a chunk may be."""
    chunks = num_chunks * (num_rows * shape[1] * 2 + 4)
    assert 0 <= array_bytes(shape, torch.bfloat16) - chunks < 1000


def test_equal_tensors_give_equal_bytes_in_every_process(store: UnitStore, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from storage import arrays; arrays.CHUNK_BYTES = 8192; "
        "arrays.write_array(Path(sys.argv[1]), torch.arange(30000).reshape(3000, 10).bfloat16())"
    )
    other = tmp_path / "other"
    subprocess.run([sys.executable, "-c", code, str(other)], cwd=ROOT, check=True, timeout=120)
    store.write(U + "a", torch.arange(30000).reshape(3000, 10).bfloat16())
    there, here = ({file.name: file.read_bytes() for file in root.iterdir()} for root in (other, store.folder / "a"))
    assert there == here
    assert len(here) == 9


def test_zarr_is_loaded_where_an_array_is_touched() -> None:
    code = "import sys, pipeline.status, workers.messages, storage.unit_store; assert 'zarr' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_an_attempt_is_a_zarr_group_that_lists_its_arrays(store: UnitStore) -> None:
    store.write(U + "calls/block-0", torch.ones(2))
    store.write(U + "calls/block-1", torch.ones(3))
    store.write(U + "salience", torch.ones(4))
    group = zarr.open_group(store.folder, mode="r")
    names = sorted(name for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array))
    assert names == ["calls/block-0", "calls/block-1", "salience"]


def test_every_bf16_value_survives(store: UnitStore) -> None:
    """All finite bit patterns, denormals and both zeros included."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = codes[torch.isfinite(codes)]
    assert len(finite) == 2 * 0x7F80
    store.write(U + "a", finite)
    assert bits(store.read(U + "a")) == bits(finite)


def test_outputs_describe_the_files_from_the_attempt_s_folder(store: UnitStore) -> None:
    store.write(U + "x/y", make((1021, 17), torch.bfloat16))
    store.write_file(U + "note.txt", lambda path: path.write_text("said"))
    files = ["x/zarr.json", "zarr.json", *(f"x/y/c.{number}.0" for number in range(5)), "x/y/zarr.json", "note.txt"]
    assert [output.path for output in store.outputs] == files
    for output in store.outputs:
        raw = (store.folder / output.path).read_bytes()
        assert (output.num_bytes, output.checksum) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert store.publish() == store.outputs
    assert store.file(U + "note.txt").read_text() == "said"


def test_an_attempt_that_fails_leaves_nothing_and_another_one_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = []
    for fails in (True, False):
        with contextlib.suppress(KeyError), unit_store(tmp_path) as store:
            store.write(U + "a", torch.ones(3))
            folders.append(store.folder)
            if fails:
                raise KeyError
    assert [folder.exists() for folder in folders] == [False, True]
    assert folders[0].parent == folders[1].parent


def test_odd_tensors_are_written_as_their_values(store: UnitStore) -> None:
    base = make((40, 50), torch.float32)
    for index, tensor in enumerate((base.T, base[::3, 1::2], base.clone().requires_grad_(), base[0].expand(30, 50))):
        store.write(f"{U}a{index}", tensor)
        assert torch.equal(store.read(f"{U}a{index}"), tensor.detach())


def test_result_owns_its_memory(store: UnitStore) -> None:
    store.write(U + "a", torch.zeros(100, 3))
    store.read(U + "a").add_(1)
    assert store.read(U + "a").sum() == 0


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 1021), (0, 1), (204, 206), (205, 410), (1020, 1021), (17, 1000), (-5, None), (None, -1000), (8, 8), (9, 3)],
)
def test_row_windows(store: UnitStore, start: int | None, stop: int | None) -> None:
    tensor = make((1021, 17), torch.bfloat16)
    store.write(U + "a", tensor)
    assert zarr.open_array(store.folder / "a", mode="r").chunks == (205, 17)
    window = store.read(U + "a", rows=slice(start, stop))
    assert bits(window) == bits(tensor[start:stop])
    assert window.shape == tensor[start:stop].shape


def test_bad_windows_say_what_the_rows_are(store: UnitStore) -> None:
    store.write(U + "a", torch.zeros(10, 2))
    store.write(U + "scalar", torch.zeros(()))
    with raises(ValueError, "rows", "5:11", U + "a", 10):
        store.read(U + "a", rows=slice(5, 11))
    with raises(ValueError, "rows", U + "a", slice(0, 10, 2)):
        store.read(U + "a", rows=slice(0, 10, 2))
    with raises(ValueError, "rows", U + "scalar", slice(0, 1)):
        store.read(U + "scalar", rows=slice(0, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [1, -1, float("inf"), -float("inf")], ids=("nan", "-nan", "inf", "-inf"))
def test_non_finite_is_refused_with_count_and_place(store: UnitStore, dtype: torch.dtype, value: float) -> None:
    tensor = make((1021, 17), dtype)
    if np.isfinite(value):
        tensor[800, 3] = tensor[1000, 16] = torch.copysign(torch.tensor(float("nan")), torch.tensor(value))
    else:
        tensor[800, 3] = tensor[1000, 16] = value
    with raises(ValueError, U + "a", 2, 17357, [800, 3]):
        store.write(U + "a", tensor)
    assert not store.folder.exists()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_largest_finite_values_are_no_infinity(store: UnitStore, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tensor = torch.tensor([info.max, info.min, info.tiny, -0.0], dtype=dtype)
    store.write(U + "a", tensor)
    assert bits(store.read(U + "a")) == bits(tensor)


def test_dtype_that_cannot_be_stored(store: UnitStore) -> None:
    with raises(ValueError, torch.complex64, "bool", "bfloat16"):
        store.write(U + "a", torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/etc/x", "a/../b", "", ".", "a//b", "a/", ".hidden", "a/.x.partial", "__meta", "zarr.json"),
        *("a\\b", "a b", "a:b", "a\0", "a\n", "é", "x" * 129),
    ],
)
def test_names_that_could_leave_or_confuse_the_store_are_refused(store: UnitStore, name: str) -> None:
    with raises(ValueError, "name", repr(U + name)):
        store.write(U + name, torch.ones(1))
    with raises(ValueError, repr(U + name)):
        store.read(U + name)
    assert not store.folder.exists()


@pytest.mark.parametrize("name", ["a", "trajectories/other/a", "selection/u/a", "trajectories/u"])
def test_only_the_unit_s_own_outputs_are_written(store: UnitStore, name: str) -> None:
    with raises(ValueError, repr(name), repr(U)):
        store.write(name, torch.ones(1))


def test_links_out_of_the_cache_are_not_followed(tmp_path: Path) -> None:
    record = done(tmp_path / "run", "v", a=torch.ones(3))
    data = tmp_path / "run" / "cache" / record.key / str(record.attempt) / "a" / "c.0"
    data.rename(tmp_path / "c.0")
    data.symlink_to(tmp_path / "c.0")
    store = unit_store(tmp_path / "run", v=record.fingerprint)
    with raises(DamagedArray, "trajectories/v/a", "c.0", "link"):
        store.read("trajectories/v/a")


def test_a_cache_below_a_symbolic_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    record = done(tmp_path / "link", "v", a=torch.ones(3))
    assert unit_store(tmp_path / "link", v=record.fingerprint).read("trajectories/v/a").sum() == 3


def test_arrays_and_groups_do_not_swallow_each_other(store: UnitStore) -> None:
    store.write(U + "a/b", torch.ones(3))
    for name in ("a", "a/b", "a/b/c"):
        with raises(ValueError, repr(U + name), "taken"):
            store.write(U + name, torch.ones(1))
    assert store.read(U + "a/b").sum() == 3


def test_only_what_the_record_of_an_input_names_is_read(tmp_path: Path) -> None:
    record = done(tmp_path, "v", a=torch.ones(3))
    attempt = tmp_path / "cache" / record.key / str(record.attempt)
    shutil.copytree(attempt / "a", attempt / "b")
    store = unit_store(tmp_path, v=record.fingerprint)
    assert store.read("trajectories/v/a").sum() == 3
    with raises(DamagedArray, "trajectories/v/b"):
        store.read("trajectories/v/b")
    store.cache.remove(record.stage, record.fingerprint)
    with raises(DamagedArray, "trajectories/v", "not done"):
        unit_store(tmp_path, v=record.fingerprint).read("trajectories/v/a")


def test_damaged_array_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedArray("a", "short")))  # noqa: S301  Ray pickles what workers raise
    assert (error.name, error.reason) == ("a", "short")
    assert names(str(error), "'a'", "short")


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)])
def test_shapes_are_read_without_the_data(store: UnitStore, shape: tuple[int, ...]) -> None:
    store.write(U + "x/a", torch.zeros(shape, dtype=torch.bfloat16))
    assert store.shape(U + "x/a") == shape
    with raises(DamagedArray, U + "x/b"):
        store.shape(U + "x/b")
