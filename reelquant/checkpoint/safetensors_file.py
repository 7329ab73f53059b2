"""Safetensors files as headers and byte ranges: read without loading, written tensor by tensor in a fixed order.

The same tensors always give the same bytes, and no more than one chunk of one tensor is in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from reelquant.quantization.layer_spec import TensorInfo

_CHUNK_BYTES = 16 * 2**20
_MAX_HEADER_BYTES = 100_000_000
_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SAFETENSORS_DTYPES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


class TensorBytes(Protocol):
    """A tensor that can be written: dtype, shape, length and bytes."""

    @property
    def info(self) -> TensorInfo:
        """Dtype and shape."""

    @property
    def num_bytes(self) -> int:
        """Length of the data."""

    def chunks(self) -> Iterator[bytes]:
        """The data, little-endian, in order."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file."""

    info: TensorInfo
    path: Path
    offset: int
    num_bytes: int

    def chunks(self) -> Iterator[bytes]:
        """The data in pieces of at most 16 MiB.

        Raises:
            ValueError: the file ends before the tensor does.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            yield from self.chunks_of(file)

    def chunks_of(self, file: BinaryIO) -> Iterator[bytes]:
        """The data from an open file that stands at its beginning; as `chunks`."""
        left = self.num_bytes
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ValueError(f"{self.path}: ends {left} bytes before the tensor at offset {self.offset} does")
            left -= len(chunk)
            yield chunk

    def read_bytes(self) -> bytes:
        """The data."""
        return b"".join(self.chunks())

    def read(self) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            ValueError: torch has no such dtype, or the file ends before the tensor does.
        """
        if self.info.dtype not in _TORCH_DTYPES:
            raise ValueError(f"{self.path}: dtype {self.info.dtype} is not among {sorted(_TORCH_DTYPES)}")
        dtype = _TORCH_DTYPES[self.info.dtype]
        if not self.num_bytes:
            return torch.empty(self.info.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.read_bytes()), dtype=dtype).reshape(self.info.shape)


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor in memory that is to be written."""

    tensor: Tensor

    @property
    def info(self) -> TensorInfo:
        """Dtype and shape."""
        return tensor_info(self.tensor)

    @property
    def num_bytes(self) -> int:
        """Length of the data."""
        return self.tensor.numel() * self.tensor.element_size()

    def read_bytes(self) -> bytes:
        """The data."""
        flat = self.tensor.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes()

    def chunks(self) -> Iterator[bytes]:
        """The data, in one piece."""
        yield self.read_bytes()


def tensor_info(tensor: Tensor) -> TensorInfo:
    """Dtype and shape of a tensor.

    Raises:
        ValueError: safetensors has no such dtype.
    """
    if tensor.dtype not in _SAFETENSORS_DTYPES:
        raise ValueError(f"dtype {tensor.dtype} cannot be stored; possible are {sorted(_TORCH_DTYPES)}")
    return TensorInfo(_SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape))


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors by name, and the metadata, of a safetensors file, from its header and its length.

    Raises:
        ValueError: the file is cut off, longer than its tensors, or no safetensors file.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path}: cut off inside its header, or no safetensors file ({size} bytes)")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        tensors = {name: _entry(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its header is not that of a safetensors file ({error})") from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != end:
            raise ValueError(f"{path}: tensor {name} begins at byte {tensor.offset}, not at {end}")
        end += tensor.num_bytes
    if end != size:
        kind = "cut off" if size < end else "too long"
        raise ValueError(f"{path}: {kind}: its header promises {end} bytes, it has {size}")
    return tensors, metadata


@dataclass(frozen=True)
class ScannedFile:
    """A safetensors file, all of whose bytes were read."""

    sha256: str
    tensors: Mapping[str, StoredTensor]
    """By name."""
    non_finite: tuple[str, ...]
    """Names of the tensors with a NaN or an infinite value."""


def scan_file(path: Path) -> ScannedFile:
    """Reads a safetensors file once, for its checksum and its numbers.

    Raises:
        ValueError: as `read_header`.
        OSError: the file cannot be read.
    """
    tensors, _ = read_header(path)
    ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes))
    digest, non_finite = hashlib.sha256(), []
    with path.open("rb") as file:
        digest.update(file.read(ordered[0][1].offset if ordered else path.stat().st_size))
        for name, tensor in ordered:
            dtype, finite = _TORCH_DTYPES.get(tensor.info.dtype), True
            for chunk in tensor.chunks_of(file):
                digest.update(chunk)
                finite = finite and (dtype is None or _is_finite(chunk, dtype))
            non_finite += [] if finite else [name]
    return ScannedFile(digest.hexdigest(), tensors, tuple(non_finite))


def _is_finite(data: bytes, dtype: torch.dtype) -> bool:
    """One pass at memory speed: the extremes of numbers with a NaN among them are NaN."""
    if not dtype.is_floating_point:
        return True
    numbers = torch.frombuffer(bytearray(data), dtype=dtype)
    return bool(torch.isfinite(torch.stack(torch.aminmax(numbers.float() if dtype.itemsize == 1 else numbers))).all())


def write_file(path: Path, tensors: Mapping[str, TensorBytes], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file and flushes it to the disk.

    Tensors are laid out from the largest element to the smallest, then by name, so that each is aligned.

    Raises:
        ValueError: a tensor's data ends early.
        OSError: the file cannot be written; names it and its size.
    """
    names = sorted(tensors, key=lambda name: (-_element_bytes(tensors[name]), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": tensor.info.dtype,
            "shape": list(tensor.info.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                for chunk in tensors[name].chunks():
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        num_bytes = 8 + len(text) + offset
        raise OSError(error.errno, f"{error.strerror}, writing {num_bytes} bytes", str(path)) from error


def _entry(path: Path, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    info = TensorInfo(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
    num_elements = math.prod(info.shape)
    if info.dtype in _TORCH_DTYPES and end - start != num_elements * _TORCH_DTYPES[info.dtype].itemsize:
        raise ValueError(f"{info} does not take {end - start} bytes")
    return StoredTensor(info, path, data_start + start, end - start)


def _element_bytes(tensor: TensorBytes) -> int:
    return tensor.num_bytes // max(math.prod(tensor.info.shape), 1)
