"""Writing and reading the data file of one array: one pass over the bytes, no copy of the tensor.

While a block is in the CPU's cache it is checked for NaN and infinity, added to the chunk's crc32c and handed to the
kernel, which starts to write out each chunk at once; a second thread hashes it. On the way back other threads read chunks
straight into their places in the result, two ahead of the one that is being verified.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from storage.run_store import Bytes, RangeReader
from storage.zarr_layout import CRC_BYTES, ArrayLayout

_BLOCK_BYTES = 512 * 1024
"""What is checked and summed at once: fits the second-level cache, and is a multiple of every item size."""

_INFINITY_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}

_CHUNKS_AHEAD = 2
"""Chunks that each reading thread is ahead of the one that is verified."""


class NotFinite(ValueError):
    """NaN or infinity where neither may be."""


def write_data_file(path: Path, layout: ArrayLayout, data: Bytes) -> str:
    """Write ``data`` (the array's bytes in C order) as the new file ``path`` and sync it.

    Returns:
        SHA-256 of the file, hex.

    Raises:
        NotFinite: NaN or infinity in ``data``: how many, where the first.
        OSError: the partly written file stays; the caller removes it.
    """
    digest = hashlib.sha256()

    def hash_pieces(pieces: Sequence[Bytes]) -> None:
        for piece in pieces:
            digest.update(piece.data)

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="sha256") as hasher:
            written, hashed = 0, []
            for chunk in _full_chunks(layout, data):
                crc = 0
                for block in _blocks(*chunk):
                    crc = _checked_crc(block, layout.dtype, crc)
                    _write_fully(descriptor, block)
                checksum = _as_bytes(crc.to_bytes(CRC_BYTES, "little"))
                _write_fully(descriptor, checksum)
                hashed.append(hasher.submit(hash_pieces, (*chunk, checksum)))
                # Starts the write-out of these pages now, so that the final sync has little left to wait for.
                num_bytes = layout.chunk_bytes + CRC_BYTES
                os.posix_fadvise(descriptor, written, num_bytes, os.POSIX_FADV_DONTNEED)
                written += num_bytes
            index = _as_bytes(layout.index())
            _write_fully(descriptor, index)
            hashed.append(hasher.submit(hash_pieces, (index,)))
            os.fsync(descriptor)
            for future in hashed:
                future.result()
    except NotFinite as error:
        raise NotFinite(_describe_not_finite(layout, data)) from error
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def read_rows(reader: RangeReader, layout: ArrayLayout, out: Bytes, *, start: int, stop: int) -> None:
    """Read rows ``start`` to ``stop`` of the data file into ``out``, every checksum on the way verified.

    Args:
        reader: the open data file.
        layout: of the array in it.
        out: ``(stop - start) * layout.row_bytes`` bytes, written in place; not to be used after an error.
        start: first row, 0 for a scalar.
        stop: one past the last row.

    Raises:
        NotFinite: NaN or infinity.
        ValueError: wrong size, or a checksum that does not hold; says where.
    """
    if reader.num_bytes != layout.data_bytes:
        raise ValueError(f"{layout.data_file} has {reader.num_bytes} bytes, {layout.data_bytes} expected")
    index = np.empty(layout.index_bytes, np.uint8)
    if index.nbytes:
        reader.read_into([index], layout.data_bytes - layout.index_bytes)
    offsets = layout.parse_index(index.tobytes())
    wanted = range(start // layout.chunk_rows, -(-stop // layout.chunk_rows))
    with ThreadPoolExecutor(reader.num_threads, thread_name_prefix="read-ahead") as readers:
        pending: deque[Future[_Chunk]] = deque()
        for chunk in wanted:
            target = _chunk_target(layout, out, chunk * layout.chunk_rows, start=start, stop=stop)
            pending.append(readers.submit(_fetch, reader, layout, target, chunk=chunk, offset=offsets[chunk]))
            if len(pending) > _CHUNKS_AHEAD * reader.num_threads:
                _deliver(pending.popleft().result(), layout, out, start=start, stop=stop)
        while pending:
            _deliver(pending.popleft().result(), layout, out, start=start, stop=stop)


@dataclass(frozen=True)
class _Chunk:
    """A chunk as it came from the disk, not yet verified."""

    number: int
    offset: int
    """In the data file."""
    rows: Bytes
    """Its rows of the array; a view of the result where all of them are asked for."""
    padding: Bytes
    checksum: bytes


def _chunk_target(layout: ArrayLayout, out: Bytes, first: int, *, start: int, stop: int) -> Bytes:
    """Where to read the chunk whose first row is ``first``: into the result if it wants all of the chunk's rows."""
    last = min(first + layout.chunk_rows, layout.num_rows)
    if start <= first and last <= stop:
        return out[(first - start) * layout.row_bytes : (last - start) * layout.row_bytes]
    return np.empty((last - first) * layout.row_bytes, np.uint8)


def _fetch(reader: RangeReader, layout: ArrayLayout, target: Bytes, *, chunk: int, offset: int) -> _Chunk:
    padding = np.empty(layout.chunk_bytes - target.nbytes, np.uint8)
    checksum = np.empty(CRC_BYTES, np.uint8)
    try:
        reader.read_into((target, padding, checksum), offset)
    except ValueError as error:
        raise ValueError(f"chunk {chunk} at byte {offset} ends early: {error}") from error
    return _Chunk(chunk, offset, target, padding, checksum.tobytes())


def _deliver(chunk: _Chunk, layout: ArrayLayout, out: Bytes, *, start: int, stop: int) -> None:
    """Verify a chunk, and copy what the result wants of it unless it was read right into its place."""
    where = f"chunk {chunk.number} of {layout.num_chunks} at byte {chunk.offset}"
    crc = 0
    try:
        for block in _blocks(chunk.rows, chunk.padding):
            crc = _checked_crc(block, layout.dtype, crc)
    except NotFinite as error:
        raise NotFinite(f"{where} holds NaN or infinity") from error
    if crc.to_bytes(CRC_BYTES, "little") != chunk.checksum:
        raise ValueError(f"{where} does not match its crc32c")
    if not np.may_share_memory(chunk.rows, out):
        first = chunk.number * layout.chunk_rows
        low, high = max(start, first), min(stop, first + layout.chunk_rows)
        part = chunk.rows[(low - first) * layout.row_bytes : (high - first) * layout.row_bytes]
        out[(low - start) * layout.row_bytes : (high - start) * layout.row_bytes] = part


def _full_chunks(layout: ArrayLayout, data: Bytes) -> Iterator[tuple[Bytes, ...]]:
    """The inner chunks as views of ``data``; zero bytes complete the last one."""
    for begin in range(0, data.nbytes, layout.chunk_bytes):
        chunk = data[begin : begin + layout.chunk_bytes]
        missing = layout.chunk_bytes - chunk.nbytes
        yield (chunk, np.zeros(missing, np.uint8)) if missing else (chunk,)


def _blocks(*pieces: Bytes) -> Iterator[Bytes]:
    for piece in pieces:
        for begin in range(0, piece.nbytes, _BLOCK_BYTES):
            yield piece[begin : begin + _BLOCK_BYTES]


def _checked_crc(block: Bytes, dtype: torch.dtype, crc: int) -> int:
    """``crc`` (crc32c) extended by ``block``, which is looked through for NaN and infinity on the way."""
    if _has_non_finite(block, dtype):
        raise NotFinite
    return int(google_crc32c.extend(crc, block))


def _has_non_finite(block: Bytes, dtype: torch.dtype) -> bool:
    """Exact, at memory speed: the bits of NaN and infinity are the largest of their sign.

    Seen as signed integers all negative values fall away; seen as unsigned ones they come out on top.
    """
    infinity = _INFINITY_BITS.get(dtype)
    if infinity is None:
        return False
    num_bits = 8 * dtype.itemsize
    positive = block.view(f"i{dtype.itemsize}").max() >= infinity
    return bool(positive or block.view(f"u{dtype.itemsize}").max() >= infinity | 1 << (num_bits - 1))


def _describe_not_finite(layout: ArrayLayout, data: Bytes) -> str:
    values = torch.from_numpy(data).view(layout.dtype)
    positions = torch.nonzero(~torch.isfinite(values)).flatten()
    first = tuple(int(index) for index in np.unravel_index(int(positions[0]), layout.shape))
    return f"{len(positions)} of {len(values)} values are NaN or infinite, the first at {list(first)}"


def _write_fully(descriptor: int, block: Bytes) -> None:
    """Write all of ``block``, however little the kernel takes at a time."""
    view = block.data
    while view:
        view = view[os.write(descriptor, view) :]


def _as_bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)
