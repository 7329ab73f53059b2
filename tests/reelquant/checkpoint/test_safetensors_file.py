import errno
import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reelquant.checkpoint.safetensors_file import open_file, scan_file, write_file
from reelquant.quantization.layer_spec import TORCH_DTYPES, TensorInfo
from tests.errors import names, raises

TENSORS = {
    "b": torch.arange(3, dtype=torch.uint8),
    "a": torch.randn(5, 3).bfloat16(),
    "c": torch.randn(7),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "mask": torch.tensor([True, False, True]),
    "strided": torch.randn(4, 6).T,
}


def write(path: Path) -> Path:
    write_file(path, TENSORS, {"format": "pt"})
    return path


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    loaded = load_file(write(tmp_path / "x.safetensors"))
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, path, metadata={"format": "pt"})
    tensors, metadata = open_file(path)
    assert metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name].read(), tensor), name
        assert tensors[name].info == TensorInfo.of(tensor)


def test_every_dtype_is_written_scanned_and_read(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    write_file(tmp_path / "x", tensors, {})
    found, _ = open_file(tmp_path / "x")
    assert {name: tensor.info for name, tensor in found.items()} == {name: TensorInfo(name, (3,)) for name in tensors}
    assert all(found[name].read().view(torch.uint8).equal(tensors[name].view(torch.uint8)) for name in tensors)
    assert sum(tensor.info.num_bytes for tensor in found.values()) == sum(t.nbytes for t in tensors.values())
    assert scan_file(tmp_path / "x").non_finite == ()


_WRITER = """
import sys, torch
from pathlib import Path
from reelquant.checkpoint.safetensors_file import write_file
names = sys.argv[2:]
write_file(Path(sys.argv[1]), {n: torch.arange(len(n) + 3).to(torch.uint8 if "b" in n else torch.float32) for n in names},
           {"reelquant": "one entry"})
"""


def test_same_tensors_give_the_same_bytes_in_any_order_and_process(tmp_path: Path) -> None:
    names = [f"{part}.{index}" for index in range(20) for part in ("ab", "cd", "eff")]
    orders, written = (names, names[::-1]), set()
    for number, order in enumerate(orders):
        path = tmp_path / str(number)
        # Rust's maps have another order in each process.
        subprocess.run([sys.executable, "-c", _WRITER, str(path), *order], check=True, env={**os.environ})
        written.add(path.read_bytes())
    assert len(written) == 1


def test_a_file_has_the_permissions_that_the_process_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write(tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("length", [0, 5, 8, 60, -1])
def test_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    with raises(ValueError, path, f"{path.stat().st_size} bytes"):
        open_file(path)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    with raises(ValueError, tmp_path, "folder"):
        open_file(tmp_path)


def test_trailing_bytes_and_garbage_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes() + b"0")
    with raises(ValueError, path, path.stat().st_size):
        open_file(path)
    for header in (b"{nonsense", b"[1, 2]  ", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
        with raises(ValueError, path, "header"):
            open_file(path)


def test_dtypes_that_torch_cannot_hold_are_named_with_their_tensors(tmp_path: Path) -> None:
    path, header = tmp_path / "x", b'{"small": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0")
    with raises(ValueError, path, "small", "F4[2]", "BF16"):
        open_file(path)


def test_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors")
    tensors, _ = open_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with raises(ValueError, path, "mask"):
        tensors["mask"].read()


def test_dtype_that_is_not_stored_is_refused(tmp_path: Path) -> None:
    with raises(ValueError, torch.complex128, "BF16"):
        write_file(tmp_path / "x", {"x": torch.zeros(2, dtype=torch.complex128)}, {})


_LIMITED_WRITER = """
import resource, sys, torch
from pathlib import Path
from reelquant.checkpoint.safetensors_file import write_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_file(Path(sys.argv[1]), {"x": torch.ones(1000)}, {})
except OSError as error:
    print(error.errno, error)
"""


def test_a_file_that_does_not_fit_is_an_os_error_with_its_number(tmp_path: Path) -> None:
    """By the number a worker tells a full disk from other errors."""
    path = tmp_path / "x"
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED_WRITER, str(path)], capture_output=True, text=True, check=True
    )
    assert names(done.stdout, errno.EFBIG, path, "4000 bytes")


def test_a_scan_is_the_files_checksum_and_names_what_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelquant.checkpoint.safetensors_file._CHUNK_BYTES", 16)
    path = tmp_path / "x.safetensors"
    bad = {
        "last": torch.arange(37.0),
        "first": torch.arange(9.0).bfloat16(),
        "inside": torch.arange(30.0, dtype=torch.float64),
        "eight": torch.ones(40).to(torch.float8_e4m3fn),
    }
    bad["last"][-1], bad["first"][0], bad["inside"][11] = torch.nan, torch.inf, -torch.inf
    bad["eight"].view(torch.uint8)[33] = 0x7F  # NaN in e4m3
    write_file(path, {**TENSORS, **bad}, {})
    found = scan_file(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(found.non_finite) == set(bad)
    assert found.tensors == open_file(path)[0]
    write_file(path, {}, {})
    assert scan_file(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-1])
    with raises(ValueError, path, f"{path.stat().st_size} bytes"):
        scan_file(path)
