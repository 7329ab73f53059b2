import hashlib
import pickle
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from storage import zarr_array
from storage.calibration_store import CalibrationStore, DamagedArray
from storage.zarr_array import CHUNK_BYTES, array_bytes, write_array
from tests.errors import names, raises

ROOT = Path(__file__).resolve().parents[2]
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SHAPES = ((), (1,), (7, 3), (2, 3, 5, 1), (1021, 17), (0, 3), (4, 0), (100, 3, 2))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CalibrationStore:
    """A store whose chunks are 8 KiB: small tensors take all paths."""
    monkeypatch.setattr(zarr_array, "CHUNK_BYTES", 8192)
    return CalibrationStore(tmp_path / "calibration.zarr")


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
def test_exact_here_and_in_zarr_python(store: CalibrationStore, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = make(shape, dtype)
    store.write("a/b", tensor)

    back = store.read("a/b")
    assert (back.shape, back.dtype) == (tensor.shape, dtype)
    assert bits(back) == bits(tensor)

    array = zarr.open_array(store.root / "a/b", mode="r")
    assert array.shape == shape
    assert array.attrs["logical_dtype"] == str(dtype).removeprefix("torch.")
    assert np.array_equal(array[...], stored_values(tensor))


@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.float32, torch.int64], ids=str)
def test_what_zarr_python_writes_is_read(store: CalibrationStore, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    store.write("a", torch.zeros(shape, dtype=dtype))
    tensor = make(shape, dtype, seed=1)
    array = zarr.open_array(store.root / "a", mode="r+", config={"write_empty_chunks": True})
    array[...] = stored_values(tensor)
    assert bits(store.read("a")) == bits(tensor)


@given(st.lists(st.integers(0, 40), max_size=4), st.sampled_from(FLOATS + INTEGERS))
def test_bytes_are_those_that_were_foretold(shape: list[int], dtype: torch.dtype) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_array, "CHUNK_BYTES", 1024)
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


def test_equal_tensors_give_equal_bytes_in_every_process(store: CalibrationStore, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from storage import zarr_array; from storage.calibration_store import CalibrationStore; "
        "zarr_array.CHUNK_BYTES = 8192; "
        "CalibrationStore(sys.argv[1]).write('a', torch.arange(30000).reshape(3000, 10).bfloat16())"
    )
    other = tmp_path / "other" / "calibration.zarr"
    subprocess.run([sys.executable, "-c", code, str(other)], cwd=ROOT, check=True, timeout=120)
    store.write("a", torch.arange(30000).reshape(3000, 10).bfloat16())
    there, here = ({file.name: file.read_bytes() for file in (root / "a").iterdir()} for root in (other, store.root))
    assert there == here
    assert len(here) == 9


def test_zarr_is_loaded_where_an_array_is_touched(tmp_path: Path) -> None:
    code = (
        "import sys, pipeline.status, workers.messages; from storage.run_directory import RunDirectory; "
        "RunDirectory(sys.argv[1]).calibration_store; assert 'zarr' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=120)


def test_store_is_a_zarr_group_that_lists_its_arrays(store: CalibrationStore) -> None:
    store.write("latents/prompt-0", torch.ones(2))
    store.write("latents/prompt-1", torch.ones(3))
    store.write("salience", torch.ones(4))
    group = zarr.open_group(store.root, mode="r")
    names = sorted(name for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array))
    assert names == ["latents/prompt-0", "latents/prompt-1", "salience"]


def test_every_bf16_value_survives(store: CalibrationStore) -> None:
    """All finite bit patterns, denormals and both zeros included."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = codes[torch.isfinite(codes)]
    assert len(finite) == 2 * 0x7F80
    store.write("a", finite)
    assert bits(store.read("a")) == bits(finite)


def test_outputs_describe_the_files_from_the_run_directory(store: CalibrationStore) -> None:
    outputs = store.write("x/y", make((1021, 17), torch.bfloat16))
    files = [*(f"c.{number}.0" for number in range(5)), "zarr.json"]
    assert sorted(output.path for output in outputs) == sorted(f"calibration.zarr/x/y/{file}" for file in files)
    for output in outputs:
        raw = (store.root.parent / output.path).read_bytes()
        assert (output.num_bytes, output.checksum) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_two_writes_give_the_same_bytes(store: CalibrationStore) -> None:
    tensor = make((1021, 17), torch.bfloat16)
    first, again, elsewhere = store.write("a", tensor), store.write("a", tensor), store.write("b", tensor.clone())
    assert first == again
    assert [output.checksum for output in first] == [output.checksum for output in elsewhere]
    assert list(store.root.glob("**/.*")) == []


def test_rewriting_replaces_shape_and_dtype(store: CalibrationStore) -> None:
    store.write("a", make((1021, 17), torch.bfloat16))
    store.write("a", make((), torch.int64))
    assert store.read("a").shape == ()
    assert sorted(file.name for file in (store.root / "a").iterdir()) == ["c", "zarr.json"]


def test_odd_tensors_are_written_as_their_values(store: CalibrationStore) -> None:
    base = make((40, 50), torch.float32)
    for tensor in (base.T, base[::3, 1::2], base.clone().requires_grad_(), base[0].expand(30, 50)):
        store.write("a", tensor)
        assert torch.equal(store.read("a"), tensor.detach())


def test_result_owns_its_memory(store: CalibrationStore) -> None:
    store.write("a", torch.zeros(100, 3))
    store.read("a").add_(1)
    assert store.read("a").sum() == 0


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 1021), (0, 1), (204, 206), (205, 410), (1020, 1021), (17, 1000), (-5, None), (None, -1000), (8, 8), (9, 3)],
)
def test_row_windows(store: CalibrationStore, start: int | None, stop: int | None) -> None:
    tensor = make((1021, 17), torch.bfloat16)
    store.write("a", tensor)
    assert zarr.open_array(store.root / "a", mode="r").chunks == (205, 17)
    window = store.read("a", rows=slice(start, stop))
    assert bits(window) == bits(tensor[start:stop])
    assert window.shape == tensor[start:stop].shape


def test_bad_windows_say_what_the_rows_are(store: CalibrationStore) -> None:
    store.write("a", torch.zeros(10, 2))
    store.write("scalar", torch.zeros(()))
    with raises(ValueError, "rows", "5:11", "'a'", 10):
        store.read("a", rows=slice(5, 11))
    with raises(ValueError, "rows", "'a'", slice(0, 10, 2)):
        store.read("a", rows=slice(0, 10, 2))
    with raises(ValueError, "rows", "'scalar'", slice(0, 1)):
        store.read("scalar", rows=slice(0, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [1, -1, float("inf"), -float("inf")], ids=("nan", "-nan", "inf", "-inf"))
def test_non_finite_is_refused_with_count_and_place(store: CalibrationStore, dtype: torch.dtype, value: float) -> None:
    before = make((1021, 17), dtype)
    store.write("a", before)
    tensor = before.clone()
    if np.isfinite(value):
        tensor[800, 3] = tensor[1000, 16] = torch.copysign(torch.tensor(float("nan")), torch.tensor(value))
    else:
        tensor[800, 3] = tensor[1000, 16] = value
    with raises(ValueError, "'a'", 2, 17357, [800, 3]):
        store.write("a", tensor)
    assert bits(store.read("a")) == bits(before)
    assert list(store.root.glob("**/.*")) == []


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_largest_finite_values_are_no_infinity(store: CalibrationStore, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tensor = torch.tensor([info.max, info.min, info.tiny, -0.0], dtype=dtype)
    store.write("a", tensor)
    assert bits(store.read("a")) == bits(tensor)


def test_dtype_that_cannot_be_stored(store: CalibrationStore) -> None:
    with raises(ValueError, torch.complex64, "bool", "bfloat16"):
        store.write("a", torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/etc/x", "a/../b", "", ".", "a//b", "a/", ".hidden", "a/.x.partial", "__meta", "zarr.json"),
        *("a\\b", "a b", "a:b", "a\0", "a\n", "é", "x" * 129),
    ],
)
def test_names_that_could_leave_or_confuse_the_store_are_refused(store: CalibrationStore, name: str) -> None:
    with raises(ValueError, "name", repr(name)):
        store.write(name, torch.ones(1))
    with raises(ValueError, "name", repr(name)):
        store.read(name)
    assert not store.root.exists()


def test_symbolic_links_are_not_followed(store: CalibrationStore, tmp_path: Path) -> None:
    store.write("a", torch.ones(3))
    outside = tmp_path / "outside"
    outside.mkdir()
    (store.root / "link").symlink_to(outside)
    for name in ("link", "link/x"):
        with raises(ValueError, repr(name), outside):
            store.write(name, torch.ones(1))
        with raises(ValueError, repr(name), outside):
            store.read(name)
    assert list(outside.iterdir()) == []
    data = store.root / "a" / "c.0"
    data.rename(outside / "c.0")
    data.symlink_to(outside / "c.0")
    with raises(DamagedArray, "'a'", "c.0", outside / "c.0"):
        store.read("a")


def test_store_below_a_symbolic_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = CalibrationStore(tmp_path / "link" / "calibration.zarr")
    store.write("a/b", torch.ones(3))
    assert store.read("a/b").sum() == 3


def test_arrays_and_groups_do_not_swallow_each_other(store: CalibrationStore) -> None:
    store.write("a/b", torch.ones(3))
    with raises(ValueError, "'a'", "group"):
        store.write("a", torch.ones(1))
    with raises(ValueError, "'a/b/c'", store.root / "a/b"):
        store.write("a/b/c", torch.ones(1))
    assert store.read("a/b").sum() == 3
    with raises(DamagedArray, "'a'", "zarr.json"):
        store.read("a")


def test_damaged_array_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedArray("a", "short")))  # noqa: S301  Ray pickles what workers raise
    assert (error.name, error.reason) == ("a", "short")
    assert names(str(error), "'a'", "short")


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)])
def test_shapes_are_read_without_the_data(store: CalibrationStore, shape: tuple[int, ...]) -> None:
    store.write("x/a", torch.zeros(shape, dtype=torch.bfloat16))
    assert store.shape("x/a") == shape
    with raises(DamagedArray, "'x/b'"):
        store.shape("x/b")
