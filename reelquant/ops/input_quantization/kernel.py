"""The input of a quantized linear layer in one pass of Triton: LayerNorm, modulation, channel scale, rotation, quantization.

A tile holds TOKENS whole tokens as `[TOKENS * SLOTS, BLOCK]`, one row for each block of the rotation (SLOTS is their number
filled up to a power of two), so that the rotation is one product with the `[BLOCK, BLOCK]` matrix on the tensor cores.
Operands are float16: every row is first scaled by a power of two that puts its largest value into [2^14, 2^15), which
loses nothing and makes float16 as accurate as TF32 (2^-12) at twice its speed. Programs walk tiles: the matrix is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelquant.ops.input_quantization.reference import Norm
from reelquant.quantization.quantizer import SMALLEST_SCALE, max_code

PLAIN_BLOCK = 128
"""Width of a tile's rows where there is no rotation, if it divides d."""
SMALL_TILE = 8192
LARGEST_TILE = 16384
"""Values of a token, its blocks filled up to a power of two, that a program can hold."""
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: what is added to it is rounded to an integer, ties to even, which then stands in the lowest bits."""


@dataclass(frozen=True)
class Config:
    """Tile and schedule of one launch."""

    tile: int
    """Least number of values of a tile; one token has at least its own."""
    num_warps: int
    programs: int
    """On each multiprocessor at once."""
    max_registers: int | None = None
    """Of a thread, so that `programs` of them fit."""
    prefetch: bool = False
    """Whether a tile is loaded while the one before it is computed."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _to_rows(of_tokens, TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    return tl.reshape(tl.broadcast_to(of_tokens[:, None], (TOKENS, SLOTS)), (TOKENS * SLOTS,))


@triton.jit
def _token_sums(values, TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    sums = tl.sum(tl.reshape(tl.sum(values, 1), (TOKENS, SLOTS)), 1)
    return _to_rows(sums, TOKENS, SLOTS)


@triton.jit
def _load(x, token, columns, used, stride, num_tokens):
    inside = (used & (token < num_tokens))[:, None]
    return tl.load(x + token.to(tl.int64)[:, None] * stride + columns, mask=inside, other=0.0)


@triton.jit
def _power_of_two(exponent):
    # From the biased exponent of a float32.
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _quantize_input(
    x, factor, offset, rotation, clip, codes, token_scale, stride, num_tokens, eps,
    NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr, LARGEST: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    d: tl.constexpr = NUM_BLOCKS * BLOCK
    row = tl.arange(0, TOKENS * SLOTS)
    block = row % SLOTS
    used = block < NUM_BLOCKS
    inner = tl.arange(0, BLOCK)
    columns = block[:, None] * BLOCK + inner[None, :]
    if rotation is not None:
        matrix = tl.load(rotation + inner[:, None] * BLOCK + inner[None, :])
    if PREFETCH:
        token = tl.program_id(0) * TOKENS + row // SLOTS
        following = _load(x, token, columns, used, stride, num_tokens)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_tokens, TOKENS), tl.num_programs(0)):
        token = tile * TOKENS + row // SLOTS
        inside = (used & (token < num_tokens))[:, None]
        if PREFETCH:
            y = following.to(tl.float32)
            following = _load(x, token + tl.num_programs(0) * TOKENS, columns, used, stride, num_tokens)
        else:
            y = _load(x, token, columns, used, stride, num_tokens).to(tl.float32)
        if offset is not None:
            y = tl.where(inside, y - (_token_sums(y, TOKENS, SLOTS) / d)[:, None], 0.0)
            y *= tl.rsqrt(_token_sums(y * y, TOKENS, SLOTS) / d + eps)[:, None]
        if factor is not None:
            y *= tl.load(factor + columns, mask=used[:, None], other=0.0)
        if offset is not None:
            y += tl.load(offset + columns, mask=used[:, None], other=0.0)
        if rotation is not None:
            exponent = (tl.max(tl.abs(y), 1).to(tl.int32, bitcast=True) >> 23) & 0xFF
            exponent = tl.minimum(tl.maximum(exponent, 15), 253)
            y = tl.dot((y * _power_of_two(268 - exponent)[:, None]).to(tl.float16), matrix)
            unit = _power_of_two(exponent - 14)
            largest = tl.reduce(tl.abs(y), 1, _larger) * unit
        else:
            largest = tl.reduce(tl.abs(y), 1, _larger)
        scale = tl.reduce(tl.reshape(largest, (TOKENS, SLOTS)), 1, _larger)
        if clip is not None:
            scale *= tl.load(clip)
        scale = _larger(tl.math.div_rn(scale, LARGEST * 1.0), _SMALLEST_SCALE)
        multiplier = _to_rows(tl.math.div_rn(1.0, scale), TOKENS, SLOTS)
        if rotation is not None:
            multiplier *= unit
        y = y * multiplier[:, None] + _ROUNDING
        if clip is not None:
            y = tl.minimum(tl.maximum(y, _ROUNDING - LARGEST), _ROUNDING + LARGEST)
        integers = y.to(tl.int32, bitcast=True).to(tl.int8)
        tl.store(codes + token.to(tl.int64)[:, None] * d + columns, integers, mask=inside)
        tokens = tile * TOKENS + tl.arange(0, TOKENS)
        tl.store(token_scale + tokens, scale, mask=tokens < num_tokens)


def block_and_slots(d: int, rotation: Tensor | None) -> tuple[int, int]:
    """Width of a tile's rows (0: no width suits), and the rows of a token filled up to a power of two."""
    block = min(d & -d, PLAIN_BLOCK) if rotation is None else len(rotation)
    return block, triton.next_power_of_2(d // block)


def choose_config(values: int) -> Config:
    """By the values of a token in its tile; `benchmarks/linear_kernels.py` sweeps the alternatives."""
    if values <= SMALL_TILE:
        return Config(SMALL_TILE, num_warps=8, programs=2, max_registers=128, prefetch=True)
    return Config(LARGEST_TILE, num_warps=16, programs=1, prefetch=True)


def launch_quantize_input(
    x: Tensor,
    *,
    bits: int,
    channel_scale: Tensor | None,
    rotation: Tensor | None,
    clip: Tensor | None,
    norm: Norm | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as checked by `op.quantize_input`. `config` None: by shape."""
    num_tokens, d = x.shape
    block, slots = block_and_slots(d, rotation)
    config = config or choose_config(slots * block)
    tokens = max(1, config.tile // (slots * block))
    factor, offset = _factor_and_offset(channel_scale, norm)
    codes = torch.empty((num_tokens, d), dtype=torch.int8, device=x.device)
    token_scale = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    num_programs = min(triton.cdiv(num_tokens, tokens), config.programs * _num_multiprocessors(x.device))
    _quantize_input[(num_programs,)](
        x,
        factor,
        offset,
        None if rotation is None else rotation.to(torch.float16).contiguous(),
        clip,
        codes,
        token_scale,
        x.stride(0),
        num_tokens,
        0.0 if norm is None else norm.eps,
        NUM_BLOCKS=d // block,
        BLOCK=block,
        TOKENS=tokens,
        SLOTS=slots,
        LARGEST=max_code(bits),
        PREFETCH=config.prefetch,
        num_warps=config.num_warps,
        num_stages=1,
        maxnreg=config.max_registers,
    )
    return codes, token_scale


def _factor_and_offset(channel_scale: Tensor | None, norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    # (x * scale_plus_one + shift) / channel_scale as x * factor + offset
    if norm is None:
        return None if channel_scale is None else channel_scale.float().reciprocal().contiguous(), None
    factor, offset = norm.scale_plus_one.float(), norm.shift.float()
    if channel_scale is not None:
        factor, offset = factor / channel_scale, offset / channel_scale
    return factor.contiguous(), offset.contiguous()


@lru_cache(maxsize=16)
def _num_multiprocessors(device: torch.device) -> int:
    # In Triton's interpreter, on a CPU, any number does.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
