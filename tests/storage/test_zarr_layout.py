import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storage.zarr_layout import INNER_CHUNK_BYTES, ArrayLayout
from tests.errors import raises

DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32)


@given(st.lists(st.integers(0, 5000), max_size=4), st.sampled_from(DTYPES))
def test_metadata_round_trip_and_sizes(shape: list[int], dtype: torch.dtype) -> None:
    layout = ArrayLayout.of(tuple(shape), dtype)
    assert ArrayLayout.from_metadata(layout.metadata()) == layout
    assert layout.chunk_bytes <= max(INNER_CHUNK_BYTES, layout.row_bytes)
    if layout.num_chunks:
        assert (layout.num_chunks - 1) * layout.chunk_rows < layout.num_rows <= layout.num_chunks * layout.chunk_rows
        assert 0 <= layout.padding_bytes < layout.num_chunks * layout.row_bytes
    assert layout.data_bytes >= layout.num_rows * layout.row_bytes
    offsets = layout.parse_index(layout.index())
    assert offsets == [i * (layout.chunk_bytes + 4) for i in range(max(1, layout.num_chunks))]


def test_chunks_of_the_sizes_that_matter() -> None:
    """8,192 and 57,600 tokens of 3,072 bf16 channels: about 1,024 rows a chunk, next to no padding."""
    short = ArrayLayout.of((8192, 3072), torch.bfloat16)
    assert (short.chunk_rows, short.num_chunks, short.padding_bytes) == (1024, 8, 0)
    long = ArrayLayout.of((57600, 3072), torch.bfloat16)
    assert (long.chunk_rows, long.num_chunks, long.padding_bytes) == (1011, 57, 27 * 6144)
    row_larger_than_chunk = ArrayLayout.of((3, 2 * INNER_CHUNK_BYTES), torch.uint8)
    assert (row_larger_than_chunk.chunk_rows, row_larger_than_chunk.num_chunks) == (1, 3)


@pytest.mark.parametrize("shape", [(), (7, 3), (3000, 4096)])
def test_every_flipped_bit_of_the_metadata_is_found(shape: tuple[int, ...]) -> None:
    raw = ArrayLayout.of(shape, torch.bfloat16).metadata()
    for position in range(len(raw)):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[position] ^= 1 << bit
            with raises(ValueError, "zarr.json"):
                ArrayLayout.from_metadata(bytes(damaged))


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"\x00" * 900, b'{"codecs": []}'])
def test_what_is_no_metadata_is_refused(raw: bytes) -> None:
    with raises(ValueError, "zarr.json"):
        ArrayLayout.from_metadata(raw)


def test_truncated_metadata_is_refused() -> None:
    raw = ArrayLayout.of((7, 3), torch.float32).metadata()
    for length in range(len(raw)):
        with raises(ValueError, "zarr.json"):
            ArrayLayout.from_metadata(raw[:length])


def test_metadata_with_another_shape_is_refused_by_its_checksum() -> None:
    """57,601 rows would fit the same chunks: only the checksum tells."""
    raw = ArrayLayout.of((57600, 3072), torch.bfloat16).metadata()
    document = json.loads(raw)
    document["shape"][0] = 57601
    with raises(ValueError, "zarr.json", "checksum"):
        ArrayLayout.from_metadata(json.dumps(document, indent=2).encode())


def test_damaged_index_is_refused() -> None:
    layout = ArrayLayout.of((3000, 4096), torch.bfloat16)
    index = bytearray(layout.index())
    index[3] ^= 1
    with raises(ValueError, "c.0.0", "crc32c"):
        layout.parse_index(bytes(index))


def test_dtype_that_cannot_be_stored_is_named_with_the_ways_out() -> None:
    with raises(ValueError, torch.complex64, "bool", "bfloat16"):
        ArrayLayout.of((2,), torch.complex64)
