"""Stored weight codes expanded to INT8 in Triton: bound by memory, so integers of 32 bits carry four codes at once.

A unit is 16 codes of one row: `BITS / 2` words of 32 bits come in, 4 words go out, 16 bytes a thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelquant.ops.architecture import launching

CODES_PER_UNIT = 16
UNITS_PER_GROUP = 4
KERNEL_BITS = (4, 6, 8)


@triton.jit
def _to_bytes(stream, BITS: tl.constexpr):
    # Four codes in the low 4 * BITS bits (all 32 for BITS = 8) -> one code a byte.
    if BITS == 4:
        stream = (stream | (stream << 8)) & 0x00FF00FF
        return (stream | (stream << 4)) & 0x0F0F0F0F
    if BITS == 6:
        stream = (stream & 0xFFF) | ((stream & 0xFFF000) << 4)
        return (stream & 0x003F003F) | ((stream & 0x0FC00FC0) << 2)
    return stream


@triton.jit
def _signed_times(codes, scale, BITS: tl.constexpr):
    # Bytes of two's complement codes times an integer, modulo 256, in lanes of 16 bits so that no carry leaves a lane:
    # with u = code + SIGN, the lane u * scale + SIGN * (256 - scale) is at most 511 * SIGN and congruent to code * scale.
    SIGN: tl.constexpr = 1 << (BITS - 1)
    codes = codes ^ (SIGN * 0x01010101)
    offset = (SIGN * (256 - scale)) * 0x00010001
    even = (codes & 0x00FF00FF) * scale + offset
    odd = ((codes >> 8) & 0x00FF00FF) * scale + offset
    return (even & 0x00FF00FF) | ((odd & 0x00FF00FF) << 8)


@triton.jit
def _signed(codes, BITS: tl.constexpr):
    # Bytes of two's complement codes of BITS bits, sign extended: (u ^ SIGN) - SIGN, without a borrow between bytes.
    if BITS == 8:
        return codes
    SIGN: tl.constexpr = 1 << (BITS - 1)
    return ((codes ^ (SIGN * 0x01010101)) | 0x80808080) - (SIGN * 0x01010101) ^ 0x80808080


@triton.jit
def _expand(
    packed, group_scale, out, num_units,
    UNITS_PER_ROW: tl.constexpr, GROUPS_PER_ROW: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    units = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = units < num_units
    if group_scale is None:
        scale = None
    else:
        group = (units // UNITS_PER_ROW) * GROUPS_PER_ROW + (units % UNITS_PER_ROW) // 4
        scale = tl.load(group_scale + group, mask=inside, other=0).to(tl.uint32)
    WORDS: tl.constexpr = BITS // 2
    if BITS == 6:
        # A power of two of words cannot be loaded at once: three loads, of which L1 gives two.
        a = tl.load(packed + units * 3, mask=inside, other=0).to(tl.uint32, bitcast=True)
        b = tl.load(packed + units * 3 + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
        c = tl.load(packed + units * 3 + 2, mask=inside, other=0).to(tl.uint32, bitcast=True)
        w0, w1 = a, (a >> 24) | (b << 8)
        w2, w3 = (b >> 16) | (c << 16), c >> 8
    else:
        offsets = units[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        words = tl.load(packed + offsets, mask=inside[:, None], other=0).to(tl.uint32, bitcast=True)
        if BITS == 4:
            w0, w2 = tl.split(words)
            w1, w3 = w0 >> 16, w2 >> 16
            w0, w2 = w0 & 0xFFFF, w2 & 0xFFFF
        else:
            even, odd = tl.split(tl.permute(tl.reshape(words, (BLOCK, 2, 2)), (0, 2, 1)))
            w0, w1 = tl.split(even)
            w2, w3 = tl.split(odd)
    w0, w1, w2, w3 = _to_bytes(w0, BITS), _to_bytes(w1, BITS), _to_bytes(w2, BITS), _to_bytes(w3, BITS)
    if scale is None:
        w0, w1, w2, w3 = _signed(w0, BITS), _signed(w1, BITS), _signed(w2, BITS), _signed(w3, BITS)
    else:
        w0, w1 = _signed_times(w0, scale, BITS), _signed_times(w1, scale, BITS)
        w2, w3 = _signed_times(w2, scale, BITS), _signed_times(w3, scale, BITS)
    expanded = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK, 4))
    offsets = units[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out + offsets, expanded.to(tl.int32, bitcast=True), mask=inside[:, None])


def launch_expand_weight(
    packed: Tensor, *, bits: int, group_scale: Tensor | None, out: Tensor, block: int = 512, num_warps: int = 4
) -> Tensor:
    """Fills `out`; arguments as checked by `op.expand_weight`. `block`: units a program."""
    num_units = out.numel() // CODES_PER_UNIT
    with launching(out):
        _expand[(triton.cdiv(num_units, block),)](
            packed.view(torch.int32),
            group_scale,
            out.view(torch.int32),
            num_units,
            UNITS_PER_ROW=out.shape[1] // CODES_PER_UNIT,
            GROUPS_PER_ROW=-(-out.shape[1] // (CODES_PER_UNIT * UNITS_PER_GROUP)),
            BITS=bits,
            BLOCK=block,
            num_warps=num_warps,
        )
    return out
