"""One array as Zarr v3 in a local folder, through the ``zarr`` package; the only module that imports it.

An array is a folder of files::

    zarr.json            metadata
    c.0.0, c.1.0, ...    rows (dimension 0), cut into equal chunks of at most 16 MiB; each ends with its crc32c

The last chunk is padded with zero rows to full size; an array without elements has no chunk. bf16, which Zarr has no type for,
is stored as its bits in uint16; the attribute ``logical_dtype`` says so. Equal tensors give equal bytes. What zarr does not
give is added here: a missing chunk as an error, and neither NaN nor infinity. No codec covers ``zarr.json``: whoever reads
compares it with its SHA-256 in the unit's record.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
import zarr
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec
from zarr.core.common import ZARR_JSON
from zarr.storage import LocalStore, MemoryStore, WrapperStore

CHUNK_BYTES = 16 * 2**20
"""Upper limit of a chunk, unless one row is larger."""

_CRC_BYTES = 4
_NAMES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
_DTYPES = {name: getattr(torch, name) for name in _NAMES}

# Chunks under way at a time. More cost memory and are no faster on a disk.
zarr.config.set({"async.concurrency": 4})


class _NoHoles(WrapperStore[Store]):
    """Files of one array. One that is missing or empty is an error; zarr takes it for zeros."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer:
        found = await self._store.get(key, prototype, byte_range)
        if found is None:
            raise FileNotFoundError(f"{key} is missing")
        if not len(found):
            raise ValueError(f"{key} is empty")
        return found


def write_array(folder: Path, tensor: torch.Tensor) -> None:
    """Write the files of ``tensor`` into ``folder``, which does not exist; does not sync them.

    Memory beyond the tensor: a few chunks; one CPU copy of a tensor that is not contiguous or not on the CPU.

    Raises:
        ValueError: a dtype that cannot be stored; NaN or infinity: how many, where the first.
    """
    check_storable(tensor)
    array = _created(LocalStore(folder), tuple(tensor.shape), tensor.dtype)
    values = tensor.detach().cpu().contiguous()
    array[...] = (values.view(torch.uint16) if values.dtype is torch.bfloat16 else values).numpy()


def read_array(folder: Path, rows: slice | None = None) -> torch.Tensor:
    """The array in ``folder``, or rows of dimension 0, every chunk's crc32c verified.

    Args:
        rows: ``slice(start, stop)``; reads and verifies only the chunks that it touches.

    Returns:
        A CPU tensor of the written dtype that owns its memory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, says which; or NaN or infinity among the rows.
    """
    array = zarr.open_array(_NoHoles(LocalStore(folder, read_only=True)), mode="r", zarr_format=3)
    start, stop, _ = (rows or slice(None)).indices(array.shape[0] if array.ndim else 1)
    stop = max(start, stop)
    try:
        values = array[start:stop] if array.ndim else array[...]
    except ValueError as error:
        raise ValueError(_first_damaged(array, start, stop) or str(error)) from error
    tensor = torch.as_tensor(values).view(_DTYPES[str(array.attrs["logical_dtype"])])
    check_storable(tensor)
    return tensor


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
    files: dict[str, Buffer] = {}
    array = _created(MemoryStore(files), shape, dtype)
    return len(files[ZARR_JSON]) + array.nchunks * (prod(array.chunks) * dtype.itemsize + _CRC_BYTES)


def _created(store: Store, shape: tuple[int, ...], dtype: torch.dtype) -> zarr.Array[Any]:
    """An array without its data: its metadata is written."""
    name = str(dtype).removeprefix("torch.")
    num_rows, row_bytes = max(1, *shape[:1], 1), max(1, prod(shape[1:]) * dtype.itemsize)
    num_chunks = -(-num_rows // max(1, CHUNK_BYTES // row_bytes))
    return zarr.create_array(
        store,
        shape=shape,
        dtype="uint16" if dtype is torch.bfloat16 else name,
        chunks=(-(-num_rows // num_chunks), *(max(1, size) for size in shape[1:])) if shape else (),
        filters=None,
        compressors=Crc32cCodec(),
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},  # all files in one folder: one directory to sync
        attributes={"logical_dtype": name},
        config={"write_empty_chunks": True},
    )


def _first_damaged(array: zarr.Array[Any], start: int, stop: int) -> str | None:
    """The first damaged file of these rows and its fault, read file by file; None if no file is damaged any more."""
    if not array.ndim:
        return None
    file_rows = array.chunks[0]
    for number in range(start // file_rows, -(-stop // file_rows)):
        try:
            array[number * file_rows : (number + 1) * file_rows]
        except ValueError as error:
            return f"c.{number}{'.0' * (array.ndim - 1)}: {error}"
    return None
