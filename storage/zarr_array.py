"""One array of the calibration store as Zarr v3, through the ``zarr`` package; the only module that imports it.

An array is a folder of files::

    zarr.json            metadata
    c.0.0, c.1.0, ...    rows (dimension 0), cut into equal chunks of at most 16 MiB; each ends with its crc32c

The last chunk is padded with zero rows to full size; an array without elements has no chunk. bf16, which Zarr has no type for,
is stored as its bits in uint16; the attribute ``logical_dtype`` says so. The attribute ``metadata_crc32c`` covers the rest of
``zarr.json``, which no codec does. Earlier versions kept all chunks in one file, codec ``sharding_indexed``: still read.

zarr takes a missing chunk, and an empty file of shards, for zeros. :class:`_ArrayFiles` makes both an error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import torch
import zarr
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store
from zarr.codecs import Crc32cCodec
from zarr.core.common import ZARR_JSON
from zarr.storage import LocalStore, MemoryStore

CHUNK_BYTES = 16 * 2**20
"""Upper limit of a chunk, unless one row is larger."""

_CHECKSUM = "metadata_crc32c"
_CRC_BYTES = 4
_NAMES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
_DTYPES = {name: getattr(torch, name) for name in _NAMES}

# Chunks under way at a time. More cost memory and are no faster on a disk; it is also what a bucket is asked for at a time.
zarr.config.set({"async.concurrency": 4})


def write_array(folder: Path, tensor: torch.Tensor) -> None:
    """Write the files of ``tensor``, which :func:`check_storable` has passed, into the empty ``folder``; does not sync them.

    Memory beyond the tensor: a few chunks; one CPU copy of a tensor that is not contiguous or not on the CPU.
    """
    (folder / ZARR_JSON).write_bytes(_described(tuple(tensor.shape), tensor.dtype)[1])
    array = _open(LocalStore(folder), mode="r+").with_config({"write_empty_chunks": True})
    values = tensor.detach().cpu().contiguous()
    array[...] = (values.view(torch.uint16) if values.dtype is torch.bfloat16 else values).numpy()


def check_storable(tensor: torch.Tensor) -> None:
    """Look for what must not be stored.

    Raises:
        ValueError: a dtype that cannot be stored; NaN or infinity: how many, where the first.
    """
    if tensor.dtype not in _DTYPES.values():
        raise ValueError(f"dtype {tensor.dtype} cannot be stored: use one of {', '.join(_NAMES)}")
    # aminmax passes NaN on.
    if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        places = (~torch.isfinite(tensor)).nonzero()
        first = places[0].tolist()
        raise ValueError(f"{len(places)} of {tensor.numel()} values are NaN or infinite, the first at {first}")


def array_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of all files of an array of this shape and dtype."""
    array, metadata = _described(shape, dtype)
    return len(metadata) + array.nchunks * (prod(array.chunks) * dtype.itemsize + _CRC_BYTES)


def open_array(metadata: bytes, read: Callable[[str], bytes]) -> zarr.Array[Any]:
    """An array to read rows of.

    Args:
        metadata: content of its ``zarr.json``.
        read: gives the content of one of its other files by name; called by several threads.

    Raises:
        ValueError: the metadata is not what :func:`write_array` wrote; one flipped bit is enough.
    """
    try:
        document = json.loads(metadata)
        intact = document["attributes"][_CHECKSUM] == _checksum(document) and _render(document) == metadata
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{ZARR_JSON} is not readable as array metadata: {error!r}") from error
    if not intact:
        raise ValueError(f"{ZARR_JSON} differs from what was written: its own checksum does not hold")
    return _open(_ArrayFiles(metadata, read), mode="r")


def read_rows(array: zarr.Array[Any], start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` (0 to 1: a scalar) of an array from :func:`open_array`, every chunk's crc32c verified.

    Returns:
        A CPU tensor of the written dtype that owns its memory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, says which; or NaN or infinity among the rows.
    """
    try:
        values = array[start:stop] if array.ndim else array[...]
    except ValueError as error:
        raise ValueError(_first_damaged(array, start, stop) or str(error)) from error
    tensor = torch.as_tensor(values).view(_DTYPES[str(array.attrs["logical_dtype"])])
    check_storable(tensor)
    return tensor


class _ArrayFiles(Store):
    """Files of one array, to be read only. A file that is missing or empty is an error, which zarr takes for zeros."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, metadata: bytes, read: Callable[[str], bytes]) -> None:
        super().__init__(read_only=True)
        self._read = read
        self._kept = {ZARR_JSON: metadata}

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer:
        data = self._kept.get(key) or await asyncio.to_thread(self._read, key)
        if not data:
            raise ValueError(f"{key} is empty")
        if byte_range is None:
            return prototype.buffer.from_bytes(data)
        self._kept[key] = data  # zarr asks for ranges of shards alone, of one file many times
        if isinstance(byte_range, RangeByteRequest):
            begin, end = byte_range.start, byte_range.end
        elif isinstance(byte_range, OffsetByteRequest):
            begin, end = byte_range.offset, len(data)
        else:
            begin, end = max(0, len(data) - byte_range.suffix), len(data)
        return prototype.buffer.from_bytes(memoryview(data)[begin:end])

    def __eq__(self, other: object) -> bool:
        return self is other

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        raise NotImplementedError

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError


def _first_damaged(array: zarr.Array[Any], start: int, stop: int) -> str | None:
    """The first damaged file of these rows and its fault, read file by file; None if no file is damaged any more."""
    if not array.ndim:
        return None
    file_rows = (array.shards or array.chunks)[0]
    for number in range(start // file_rows, -(-stop // file_rows)):
        try:
            array[number * file_rows : (number + 1) * file_rows]
        except ValueError as error:
            return f"c.{number}{'.0' * (array.ndim - 1)}: {error}"
    return None


def _open(store: Store, **options: Any) -> zarr.Array[Any]:
    # Without the format zarr also looks for files of format 2, and takes an error of one that is missing for a missing array.
    return zarr.open_array(store, zarr_format=3, **options)


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[zarr.Array[Any], bytes]:
    """An array as it will be written, with its metadata and no data; and the bytes of its ``zarr.json``."""
    name = str(dtype).removeprefix("torch.")
    num_rows, row_bytes = max(1, *shape[:1], 1), max(1, prod(shape[1:]) * dtype.itemsize)
    num_chunks = -(-num_rows // max(1, CHUNK_BYTES // row_bytes))
    files: dict[str, Buffer] = {}
    array = zarr.create_array(
        MemoryStore(files),
        shape=shape,
        dtype="uint16" if dtype is torch.bfloat16 else name,
        chunks=(-(-num_rows // num_chunks), *(max(1, size) for size in shape[1:])) if shape else (),
        filters=None,
        compressors=Crc32cCodec(),
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},  # all files in one folder: one directory to sync
        attributes={"logical_dtype": name},
    )
    document = json.loads(files[ZARR_JSON].to_bytes())
    document["attributes"][_CHECKSUM] = _checksum(document)
    return array, _render(document)


def _checksum(document: dict[str, Any]) -> str:
    """crc32c of the metadata without the attribute that holds it, 8 hex digits."""
    attributes = {name: value for name, value in document["attributes"].items() if name != _CHECKSUM}
    return f"{google_crc32c.value(_render({**document, 'attributes': attributes})):08x}"


def _render(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()
