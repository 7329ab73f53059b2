from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reelquant.quantization.packing import pack_bits, pack_int4, unpack_bits, unpack_int4
from tests.errors import raises


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    limit = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit, shape, generator=generator).to(torch.int8)


def naive_pack(row: list[int], bits: int) -> list[int]:
    """The definition, as one big integer."""
    padded = row + [0] * (-len(row) % 8)
    stream = sum((code % 2**bits) << (i * bits) for i, code in enumerate(padded))
    return list(stream.to_bytes(len(padded) * bits // 8, "little"))


@given(
    bits=st.integers(2, 8),
    lead=st.lists(st.integers(0, 3), max_size=2),
    width=st.integers(0, 41),
    seed=st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_round_trip(bits: int, lead: list[int], width: int, seed: int) -> None:
    codes = random_codes((*lead, width), bits, seed)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, -(-width // 8) * bits)
    assert packed.is_contiguous()
    assert torch.equal(unpack_bits(packed, bits, width), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [1, 7, 8, 9, 24])
def test_bytes_are_the_format(bits: int, width: int) -> None:
    codes = random_codes((3, width), bits)
    assert pack_bits(codes, bits).tolist() == [naive_pack(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives_and_non_contiguous_input_too(bits: int) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8).repeat(2, 1)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, codes.shape[1]), codes)
    assert torch.equal(unpack_bits(pack_bits(codes.T, bits), bits, 2), codes.T)


@given(half=st.integers(0, 30), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_int4_round_trip_and_agreement(half: int, seed: int) -> None:
    codes = random_codes((2, 2 * half), 4, seed)
    packed = pack_int4(codes)
    assert packed.shape == (2, half)
    assert torch.equal(unpack_int4(packed), codes)
    assert torch.equal(pack_bits(codes, 4)[:, :half], packed)


def test_int4_known_bytes() -> None:
    packed = pack_int4(torch.tensor([1, -1, -8, 7], dtype=torch.int8))
    assert packed.tolist() == [0xF1, 0x78]
    assert unpack_int4(packed).tolist() == [1, -1, -8, 7]


def test_errors() -> None:
    codes = torch.tensor([[8, 0]], dtype=torch.int8)
    with raises(ValueError, "4 bits", "0 to 8"):
        pack_bits(codes, 4)
    with raises(ValueError, "4 bits", "-9 to -1"):
        pack_int4(-codes - 1)
    with raises(ValueError, 3, "pack_bits(w, 4)"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))
    with raises(ValueError, "codes", torch.float32, (2, 8)):
        pack_bits(torch.zeros(2, 8), 4)
    with raises(ValueError, "bits", 1):
        pack_bits(codes, 1)
    with raises(ValueError, 9, "3 bits", (2, 5)):
        unpack_bits(torch.zeros(2, 5, dtype=torch.uint8), 3, 9)
    with raises(ValueError, torch.int8, (1, 2)):
        unpack_int4(codes)
