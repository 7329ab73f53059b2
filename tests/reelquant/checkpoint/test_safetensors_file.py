import hashlib
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reelquant.checkpoint.safetensors_file import MemoryTensor, read_header, scan_file, write_file
from tests.errors import raises

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
    write_file(path, {name: MemoryTensor(tensor) for name, tensor in TENSORS.items()}, {"format": "pt"})
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
    tensors, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name].read(), tensor), name
        assert tensors[name].info == MemoryTensor(tensor).info


def test_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    first = write(tmp_path / "1.safetensors").read_bytes()
    backwards = {name: MemoryTensor(TENSORS[name]) for name in reversed(TENSORS)}
    write_file(tmp_path / "2.safetensors", backwards, {"format": "pt"})
    assert (tmp_path / "2.safetensors").read_bytes() == first


@pytest.mark.parametrize("length", [0, 5, 8, 60, -1])
def test_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    with raises(ValueError, path, f"{path.stat().st_size} bytes" if length >= 0 else path.stat().st_size):
        read_header(path)


def test_trailing_bytes_and_garbage_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes() + b"0")
    with raises(ValueError, path, path.stat().st_size):
        read_header(path)
    for header in (b"{nonsense", b"[1, 2]  ", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
        with raises(ValueError, path, "header"):
            read_header(path)


def test_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors")
    tensors, _ = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with raises(ValueError, path, tensors["mask"].offset):
        tensors["mask"].read()


def test_dtype_that_safetensors_lacks_is_refused(tmp_path: Path) -> None:
    with raises(ValueError, torch.complex128, "BF16"):
        write_file(tmp_path / "x", {"x": MemoryTensor(torch.zeros(2, dtype=torch.complex128))}, {})


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
    write_file(path, {name: MemoryTensor(tensor) for name, tensor in {**TENSORS, **bad}.items()}, {})
    found = scan_file(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(found.non_finite) == set(bad)
    assert found.tensors == read_header(path)[0]
    write_file(path, {}, {})
    assert scan_file(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-1])
    with raises(ValueError, path, f"{path.stat().st_size} bytes"):
        scan_file(path)
