"""Codes of 2 to 8 bits packed without gaps: the byte layout of `weight_packed` in a checkpoint (public format).

A row is a little-endian bit stream: code `i`, in two's complement, holds the bits `[i * bits, (i + 1) * bits)`, and bit
`k` of the stream is bit `k % 8` (from the least significant) of byte `k // 8`. Rows are filled up with zero codes to a
multiple of 8 codes, so 8 codes are `bits` whole bytes and every row starts on a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from reelquant.ops.fake_quantization.reference import max_code

CODES_PER_WORD = 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [..., n] -> uint8 [..., ceil(n / 8) * bits].

    Raises ValueError for `bits` outside 2..8, a dtype other than int8, or codes that `bits` bits cannot hold.
    """
    _check_codes(codes, bits)
    mask = (1 << bits) - 1
    num_words = -(-codes.shape[-1] // CODES_PER_WORD)
    words = pad(codes, (0, num_words * CODES_PER_WORD - codes.shape[-1])).unflatten(-1, (num_words, CODES_PER_WORD))
    stream = torch.zeros(words.shape[:-1], dtype=torch.int64, device=codes.device)
    for i in range(CODES_PER_WORD):
        stream |= (words[..., i].long() & mask) << (i * bits)
    packed = torch.empty((*stream.shape, bits), dtype=torch.uint8, device=codes.device)
    for j in range(bits):
        packed[..., j] = (stream >> (8 * j)) & 0xFF
    return packed.flatten(-2)


def unpack_bits(packed: Tensor, bits: int, num: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 [..., ceil(num / 8) * bits] -> int8 [..., num].

    Raises ValueError for another dtype or row length, or `bits` outside 2..8.
    """
    sign = max_code(bits) + 1
    mask = 2 * sign - 1
    num_words = -(-num // CODES_PER_WORD)
    if packed.dtype != torch.uint8 or packed.ndim < 1 or num < 0 or packed.shape[-1] != num_words * bits:
        raise ValueError(
            f"{num} codes of {bits} bits are uint8 [..., {num_words * bits}], got {packed.dtype} {tuple(packed.shape)}"
        )
    if bits == 8:
        return packed.view(torch.int8)[..., :num].contiguous()
    if bits == 4:
        return unpack_int4(packed)[..., :num].contiguous()
    in_bytes = packed.unflatten(-1, (num_words, bits))
    stream = torch.zeros(in_bytes.shape[:-1], dtype=torch.int64, device=packed.device)
    for j in range(bits):
        stream |= in_bytes[..., j].long() << (8 * j)
    codes = torch.empty((*stream.shape, CODES_PER_WORD), dtype=torch.int8, device=packed.device)
    for i in range(CODES_PER_WORD):
        codes[..., i] = (((stream >> (i * bits)) & mask) ^ sign) - sign
    return codes.flatten(-2)[..., :num].contiguous()


def pack_int4(w: Tensor) -> Tensor:
    """int8 in [-8, 7], [..., n] with even n -> uint8 [..., n / 2]; the even code is in the low four bits.

    The same bytes as `pack_bits(w, 4)` where n is a multiple of 8. Raises ValueError for odd n, another dtype, or codes
    outside [-8, 7].
    """
    _check_codes(w, 4)
    if w.shape[-1] % 2:
        raise ValueError(f"pack_int4 takes an even number of codes a row, got {w.shape[-1]}; use pack_bits(w, 4)")
    w = w.view(torch.uint8)
    return (w[..., 0::2] & 0xF) | (w[..., 1::2] << 4)


def unpack_int4(p: Tensor) -> Tensor:
    """Inverse of `pack_int4`: uint8 [..., m] -> int8 [..., 2 m] in [-8, 7]. ValueError for another dtype."""
    if p.dtype != torch.uint8 or p.ndim < 1:
        raise ValueError(f"packed codes are uint8 [..., m], got {p.dtype} {tuple(p.shape)}")
    nibbles = torch.stack((p & 0xF, p >> 4), dim=-1).flatten(-2)
    return (nibbles ^ 8).view(torch.int8) - 8


def _check_codes(codes: Tensor, bits: int) -> None:
    limit = max_code(bits) + 1
    if codes.dtype != torch.int8 or codes.ndim < 1:
        raise ValueError(f"codes must be int8 [..., n], got {codes.dtype} {tuple(codes.shape)}")
    if bits == 8 or codes.numel() == 0:
        return
    low, high = (int(bound) for bound in codes.aminmax())
    if low < -limit or high >= limit:
        raise ValueError(f"{bits} bits hold codes from {-limit} to {limit - 1}, got codes from {low} to {high}")
