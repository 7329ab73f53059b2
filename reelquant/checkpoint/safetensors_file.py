"""Safetensors files: opened once for their headers, a tensor read when it is asked for, errors that name file and tensor.

The same tensors always give the same bytes, in whichever order and process they are written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reelquant.quantization.layer_spec import TORCH_DTYPES, TensorInfo

_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file, which is open as long as one of its tensors is kept."""

    name: str
    info: TensorInfo
    path: Path
    file: safe_open = field(repr=False, compare=False)

    def read(self) -> Tensor:
        """The tensor, on the CPU, in memory of its own.

        Raises:
            ValueError: the file can no longer be read.
        """
        try:
            tensor: Tensor = self.file.get_tensor(self.name)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: tensor {self.name} cannot be read ({error})") from error
        return tensor


def open_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors by name, in the order of their bytes, and the metadata of a safetensors file.

    Raises:
        ValueError: the file is cut off, longer than its tensors, no safetensors file, or has dtypes that are not read.
        OSError: the file cannot be opened.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a safetensors file")
    try:
        # Not mapped: a file that shrinks, or a disk that fails, is an error then, not the end of the process.
        file = safe_open(path, framework="pt", backend="pread")
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(f"{path}: {size} bytes, cut off, too long or no safetensors file: {error}") from error
    slices = {name: file.get_slice(name) for name in file.offset_keys()}
    infos = {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    if unknown := [f"{name} {info}" for name, info in infos.items() if info.dtype not in TORCH_DTYPES]:
        raise ValueError(f"{path}: the dtypes of {', '.join(unknown)} are not among {', '.join(sorted(TORCH_DTYPES))}")
    return {name: StoredTensor(name, info, path, file) for name, info in infos.items()}, file.metadata() or {}


@dataclass(frozen=True)
class ScannedFile:
    """A safetensors file, all of whose bytes were read."""

    sha256: str
    tensors: Mapping[str, StoredTensor]
    """By name."""
    non_finite: tuple[str, ...]
    """Names of the tensors with a NaN or an infinite value."""


def scan_file(path: Path) -> ScannedFile:
    """Reads a safetensors file once, in pieces of 16 MiB, for its checksum and its numbers.

    Raises:
        ValueError: as `open_file`.
        OSError: the file cannot be read.
    """
    tensors, _ = open_file(path)
    digest, non_finite, buffer = hashlib.sha256(), [], memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb") as file:
        digest.update(file.read(path.stat().st_size - sum(tensor.info.num_bytes for tensor in tensors.values())))
        for name, tensor in tensors.items():
            dtype, left, finite = TORCH_DTYPES[tensor.info.dtype], tensor.info.num_bytes, True
            while left:
                chunk = buffer[: min(left, _CHUNK_BYTES)]
                if file.readinto(chunk) < len(chunk):
                    raise ValueError(f"{path}: ends before tensor {name} does")
                digest.update(chunk)
                finite = finite and _is_finite(torch.frombuffer(chunk, dtype=dtype))
                left -= len(chunk)
            non_finite += [] if finite else [name]
    return ScannedFile(digest.hexdigest(), tensors, tuple(non_finite))


def _is_finite(numbers: Tensor) -> bool:
    """One pass at memory speed: the extremes of numbers with a NaN among them are NaN."""
    if not numbers.is_floating_point():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(numbers.float() if numbers.itemsize == 1 else numbers))).all())


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, with the permissions that the process gives new files.

    Args:
        path: a new file; it is not there if an error is raised. Flushing it to the disk is the caller's business.
        metadata: at most one entry: the order of several differs from process to process.

    Raises:
        ValueError: a dtype cannot be stored.
        OSError: the file cannot be written; names it and its size.
    """
    assert len(metadata) <= 1
    num_bytes = sum(TensorInfo.of(tensor).num_bytes for tensor in tensors.values())
    path.touch()
    permissions = path.stat().st_mode & 0o777
    try:
        # Of an empty dictionary safetensors 0.8 makes a header that it cannot read.
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata=dict(metadata) or None)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, f"{os.strerror(number)}, writing {num_bytes} bytes of tensors", str(path)) from error
    path.chmod(permissions)  # safetensors makes a file that only its owner may read
