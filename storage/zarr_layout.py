"""What one calibration array looks like on disk: a Zarr v3 array, described without touching a file.

An array is a directory with two files::

    zarr.json     metadata (rendered here, so that its bytes depend on no library's version)
    c.0.0         the data: one file for the whole array (one "c" and one ".0" per dimension)

Rows (dimension 0) are cut into inner chunks of about 6 MiB, 1,024 rows of 3,072 bf16 values; each carries a crc32c::

    one chunk      chunk 0 | crc32c                                        codecs bytes, crc32c
    more chunks    chunk 0 | crc32c | chunk 1 | crc32c | ... | index       codec sharding_indexed(bytes, crc32c)
    index          per chunk: offset, length (uint64, little-endian), then its own crc32c

The last chunk is padded with zero rows to full size. bf16, which Zarr has no type for, is stored as its bits in uint16;
the attribute ``logical_dtype`` says so. The attribute ``metadata_crc32c`` covers the rest of ``zarr.json``.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from typing import Any

import google_crc32c
import torch

INNER_CHUNK_BYTES = 6 * 2**20
"""Upper limit of an inner chunk, unless one row is larger."""

METADATA_FILE = "zarr.json"
CRC_BYTES = 4

GROUP_METADATA = b'{\n  "attributes": {},\n  "zarr_format": 3,\n  "node_type": "group"\n}'
"""``zarr.json`` of a group, byte for byte what zarr-python writes."""

_STORED_DTYPES = {
    torch.bool: "bool",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "uint16",
}
_LOGICAL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORED_DTYPES}


@dataclass(frozen=True)
class ArrayLayout:
    """Where every byte of one array lies. Build it with :meth:`of` or :meth:`from_metadata`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk_rows: int
    """Rows (dimension 0) of an inner chunk; 1 for a scalar."""

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "ArrayLayout":
        """The layout in which a tensor of this shape and dtype is written.

        Raises:
            ValueError: the dtype cannot be stored.
        """
        if dtype not in _STORED_DTYPES:
            raise ValueError(f"dtype {dtype} cannot be stored: use one of {', '.join(_LOGICAL_DTYPES)}")
        num_rows = shape[0] if shape else 1
        row_bytes = max(1, prod(shape[1:]) * dtype.itemsize)
        most_rows = max(1, INNER_CHUNK_BYTES // row_bytes)
        num_chunks = max(1, -(-num_rows // most_rows))
        return cls(tuple(shape), dtype, max(1, -(-num_rows // num_chunks)))

    @classmethod
    def from_metadata(cls, raw: bytes) -> "ArrayLayout":
        """Read ``zarr.json``.

        Raises:
            ValueError: the bytes are not what :meth:`metadata` gives for any layout; one flipped bit is enough.
        """
        try:
            document = json.loads(raw)
            codec = document["codecs"][0]
            grid = codec if codec["name"] == "sharding_indexed" else document["chunk_grid"]
            chunk_shape = grid["configuration"]["chunk_shape"]
            dtype = _LOGICAL_DTYPES[document["attributes"]["logical_dtype"]]
            layout = cls(tuple(document["shape"]), dtype, chunk_shape[0] if chunk_shape else 1)
            intact = layout.metadata() == raw
        except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError, AttributeError) as error:
            raise ValueError(f"{METADATA_FILE} is not readable as array metadata: {error!r}") from error
        if not intact:
            raise ValueError(f"{METADATA_FILE} differs from what was written: its own checksum does not hold")
        return layout

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """Inner chunks in the data file; 0 for an array without elements, which has no data file."""
        return -(-self.num_rows // self.chunk_rows) if self.num_rows * self.row_bytes else 0

    @property
    def sharded(self) -> bool:
        return self.num_chunks > 1

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a full inner chunk, without its checksum."""
        return self.chunk_rows * self.row_bytes

    @property
    def padding_bytes(self) -> int:
        """Zero bytes that fill up the last chunk."""
        return self.num_chunks * self.chunk_bytes - self.num_rows * self.row_bytes

    @property
    def index_bytes(self) -> int:
        return self.num_chunks * 16 + CRC_BYTES if self.sharded else 0

    @property
    def data_bytes(self) -> int:
        """Size of the data file."""
        return self.num_chunks * (self.chunk_bytes + CRC_BYTES) + self.index_bytes

    @property
    def data_file(self) -> str:
        return "c" + ".0" * len(self.shape)

    def index(self) -> bytes:
        """The shard index as written, checksum included; empty for an array of one chunk."""
        if not self.sharded:
            return b""
        stored = self.chunk_bytes + CRC_BYTES
        entries = b"".join(struct.pack("<QQ", i * stored, stored) for i in range(self.num_chunks))
        return entries + crc_bytes(entries)

    def parse_index(self, index: bytes) -> list[int]:
        """Offset of each chunk, from the index of a shard that any Zarr writer may have written.

        Raises:
            ValueError: the index's checksum does not hold, or an entry points outside the file.
        """
        if not self.sharded:
            return [0]
        entries, checksum = index[:-CRC_BYTES], index[-CRC_BYTES:]
        if crc_bytes(entries) != checksum:
            raise ValueError(f"the shard index of {self.data_file} does not match its crc32c")
        stored, last = self.chunk_bytes + CRC_BYTES, self.data_bytes - self.index_bytes
        offsets = []
        for chunk, (offset, length) in enumerate(struct.iter_unpack("<QQ", entries)):
            if length != stored or offset + length > last:
                raise ValueError(f"chunk {chunk} is absent or outside the data in the index of {self.data_file}")
            offsets.append(offset)
        return offsets

    def metadata(self) -> bytes:
        """``zarr.json``: the same bytes for the same layout, always."""
        document = self._document()
        document["attributes"]["metadata_crc32c"] = f"{google_crc32c.value(_render(document)):08x}"
        return _render(document)

    def _document(self) -> dict[str, Any]:
        other_dims = [max(1, size) for size in self.shape[1:]]
        chunk_shape = [self.chunk_rows, *other_dims] if self.shape else []
        shard_shape = [max(1, self.num_chunks) * self.chunk_rows, *other_dims] if self.shape else []
        codecs: list[dict[str, Any]] = [_bytes_codec(self.dtype.itemsize), {"name": "crc32c"}]
        if self.sharded:
            configuration = {
                "chunk_shape": chunk_shape,
                "codecs": codecs,
                "index_codecs": [_bytes_codec(8), {"name": "crc32c"}],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": configuration}]
        stored_dtype = _STORED_DTYPES[self.dtype]
        fill_value: bool | float = False if self.dtype is torch.bool else 0.0 if "float" in stored_dtype else 0
        return {
            "shape": list(self.shape),
            "data_type": stored_dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": fill_value,
            "codecs": codecs,
            "attributes": {"logical_dtype": str(self.dtype).removeprefix("torch.")},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def crc_bytes(data: bytes) -> bytes:
    """The crc32c codec's trailer: four bytes, little-endian."""
    return struct.pack("<I", google_crc32c.value(data))


def _bytes_codec(itemsize: int) -> dict[str, Any]:
    return {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}


def _render(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()
