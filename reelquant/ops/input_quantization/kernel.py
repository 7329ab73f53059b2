"""The input of a quantized linear layer in one pass of Triton: LayerNorm, modulation, channel scale, rotation, quantization.

A tile is TOKENS whole tokens in CHUNKS pieces of `[TOKENS, SLOTS * BLOCK]`, held in registers: widths that are no power of
two, as 24 blocks of 128, are 3 pieces of 8 or one of 32 with a quarter empty. The rotation of a piece is one product of its
`[TOKENS * SLOTS, BLOCK]` blocks with the `[BLOCK, BLOCK]` matrix on the tensor cores. Values move between threads only there
and in the sums over a token: all other reshapes and permutations of the kernel rename registers. So

- the matrix's columns are permuted such that a thread's results are codes that lie side by side,
- `_prepare_vectors` stores the vectors in the order in which the threads load them.

Operands of the product are float16, scaled by a power of two that keeps the largest below 2^15. After a norm it comes from
the vectors alone (no normalized value exceeds sqrt(d)), otherwise from the token's largest value. float16 rounds to 2^-12
down to 2^-29 of that bound, and so is as accurate as TF32 at twice its speed.

Near the last token a tile moves back over tokens of the one before, which are computed twice to the same result: no masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelquant.ops.architecture import architecture, launching
from reelquant.ops.fake_quantization.reference import SMALLEST_SCALE, max_code
from reelquant.ops.input_quantization.reference import Norm

PLAIN_BLOCK = 128
"""Width of a block where there is no rotation, if it divides d."""
PIECE = 8192
"""Values of a piece with a rotation: 64 rows of 128, the least for the tensor cores of four warps."""
PLAIN_TILE = 6144
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: what is added to it is rounded to an integer, ties to even, which then stands in the lowest bits."""


@dataclass(frozen=True)
class Config:
    """Tile and schedule of one launch. `tokens * slots` is at least 16 with a rotation, better 64."""

    tokens: int
    slots: int
    """Blocks of a token in a piece. Both are powers of two."""
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
def _exponent(value):
    # Biased, of a float32 that is not negative; such that the scales made from it are normal numbers.
    return tl.minimum(tl.maximum((value.to(tl.int32, bitcast=True) >> 23) & 0xFF, 15), 252)


@triton.jit
def _power_of_two(exponent):
    # From the biased exponent of a float32.
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _prepare_vectors(
    scale_plus_one, shift, channel_scale, factor, offset, unit, D: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """`(x * scale_plus_one + shift) / channel_scale` as `x * factor + offset`, both times 1 / unit; 0 from D to WIDTH.

    WIDTH is that of all pieces. Of LANES columns the first four of all VECTOR come first, then the second four.
    """
    column = tl.arange(0, SIZE)
    inside = column < D
    a = tl.where(inside, 1.0, 0.0)
    if scale_plus_one is not None:
        a = tl.load(scale_plus_one + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
    if channel_scale is not None:
        divisor = tl.load(channel_scale + column, mask=inside, other=1.0).to(tl.float32)
        a = tl.math.div_rn(a, divisor)
        if scale_plus_one is not None:
            b = tl.math.div_rn(b, divisor)
    if SCALED:
        bound = tl.max(tl.abs(a), 0)
        if scale_plus_one is not None:
            exponent = _exponent(bound * D**0.5 + tl.max(tl.abs(b), 0))
            down, up = _power_of_two(268 - exponent), _power_of_two(exponent - 14)
            b *= down
        else:
            exponent = _exponent(bound)
            down, up = _power_of_two(253 - exponent), _power_of_two(exponent + 1)
        a *= down
        tl.store(unit, up)
    within = column % LANES
    order = (within % VECTOR) // 4 * (LANES * 4 // VECTOR) + within // VECTOR * 4 + within % 4
    order += column - within
    tl.store(factor + order, a, mask=column < WIDTH)
    if scale_plus_one is not None:
        tl.store(offset + order, b, mask=column < WIDTH)


@triton.jit
def _load_tile(x, columns, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    # Past L1, where the vectors are to stay.
    pieces = ()
    for c in tl.static_range(CHUNKS):
        if CHUNKS * WIDTH > D:
            piece = tl.load(x + c * WIDTH, mask=columns + c * WIDTH < D, other=0.0, cache_modifier=".cg")
        else:
            piece = tl.load(x + c * WIDTH, cache_modifier=".cg")
        pieces += (tl.reshape(piece, (TOKENS, WIDTH)),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _load_vector(vector, TOKENS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    # Of a piece, for each token, in the layout that `_load_tile` gives the tokens.
    PARTS: tl.constexpr = VECTOR // 4
    rows: tl.constexpr = WIDTH // LANES
    order = tl.arange(0, rows * PARTS)[None, :, None] * (LANES // PARTS) + tl.arange(0, LANES // PARTS)[None, None, :]
    values = tl.load(vector + order + tl.zeros((TOKENS, 1, 1), tl.int32), eviction_policy="evict_last")
    values = tl.permute(tl.reshape(values, (TOKENS, rows, PARTS, LANES // VECTOR, 4)), (0, 1, 3, 2, 4))
    return tl.reshape(values, (TOKENS, WIDTH))


@triton.jit
def _normalized(pieces, eps, D: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    # The centered pieces, float32, and 1 / standard deviation of the tokens.
    sums = pieces[0].to(tl.float32)
    for c in tl.static_range(1, CHUNKS):
        sums += pieces[c].to(tl.float32)
    mean = tl.sum(sums, 1) / D
    centered = (pieces[0].to(tl.float32) - mean[:, None],)
    squares = centered[0] * centered[0]
    for c in tl.static_range(1, CHUNKS):
        centered += (pieces[c].to(tl.float32) - mean[:, None],)  # type: ignore[assignment]
        squares += centered[c] * centered[c]
    # Columns beyond D are 0, so that each adds mean^2.
    variance = tl.sum(squares, 1) / D - mean * mean * (CHUNKS * WIDTH / D - 1)
    return centered, tl.rsqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)


@triton.jit
def _largest(pieces, CHUNKS: tl.constexpr):
    largest = tl.abs(pieces[0].to(tl.float32))
    for c in tl.static_range(1, CHUNKS):
        largest = _larger(largest, tl.abs(pieces[c].to(tl.float32)))
    return tl.reduce(largest, 1, _larger)


@triton.jit(do_not_specialize=["num_tokens"])
def _quantize_input(
    x, factor, offset, unit, rotation, clip, codes, token_scale, stride, num_tokens, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """LANES columns are loaded at once, VECTOR by a thread; a warp has GROUP columns of a block after the product."""
    WIDTH: tl.constexpr = SLOTS * BLOCK
    ROWS: tl.constexpr = TOKENS * SLOTS
    # Where there are fewer tokens than TOKENS, the last again.
    last = tl.minimum(num_tokens, TOKENS) - 1
    token = tl.minimum(tl.arange(0, TOKENS), last)
    columns = tl.arange(0, WIDTH // LANES)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    columns += tl.zeros((TOKENS, 1, 1), tl.int32)
    inputs = x + (token[:, None, None].to(tl.int64) * stride + columns)
    if rotation is not None:
        # Column `group, j, thread, i` of the product, as the tensor cores deal them out, is code `group, thread, j, i`.
        inner = tl.arange(0, BLOCK)
        matrix = tl.load(rotation + inner[:, None] * BLOCK + inner[None, :]).to(tl.float16)
        matrix = tl.permute(tl.reshape(matrix, (BLOCK, BLOCK // GROUP, 4, GROUP // 8, 2)), (0, 1, 3, 2, 4))
        matrix = tl.reshape(matrix, (BLOCK, BLOCK))
        scale_of_vectors = 1.0
        if unit is not None:
            scale_of_vectors = tl.load(unit)
        # Of the 16 rows of a warp a thread has two, 8 apart.
        row = tl.arange(0, ROWS // 2)[:, None, None, None]
        row = row // 8 * 16 + tl.arange(0, 2)[None, None, :, None] * 8 + row % 8
        group = tl.arange(0, BLOCK // GROUP)[None, :, None, None]
        places = row % SLOTS * BLOCK + group * GROUP + tl.arange(0, GROUP)[None, None, None, :]
        outputs = tl.max_contiguous(tl.minimum(row // SLOTS, last) * D + places, (1, 1, 1, GROUP // 4))
    else:
        places = columns
        outputs = tl.max_contiguous(token[:, None, None] * D + columns, (1, 1, VECTOR))
    if PREFETCH:
        start = tl.maximum(tl.minimum(tl.program_id(0) * TOKENS, num_tokens - TOKENS), 0)
        following = _load_tile(inputs + start.to(tl.int64) * stride, columns, D, TOKENS, WIDTH, CHUNKS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_tokens, TOKENS), tl.num_programs(0)):
        start = tl.maximum(tl.minimum(tile * TOKENS, num_tokens - TOKENS), 0)
        if PREFETCH:
            pieces = following
            then = tl.maximum(tl.minimum((tile + tl.num_programs(0)) * TOKENS, num_tokens - TOKENS), 0)
            following = _load_tile(inputs + then.to(tl.int64) * stride, columns, D, TOKENS, WIDTH, CHUNKS)
        else:
            pieces = _load_tile(inputs + start.to(tl.int64) * stride, columns, D, TOKENS, WIDTH, CHUNKS)
        if offset is not None:
            pieces, multiplier = _normalized(pieces, eps, D, WIDTH, CHUNKS)
        elif rotation is not None:
            exponent = _exponent(_largest(pieces, CHUNKS))
            multiplier = _power_of_two(268 - exponent)
        results = ()
        for c in tl.static_range(CHUNKS):
            y = pieces[c].to(tl.float32)
            if (offset is not None) or (rotation is not None):
                y *= multiplier[:, None]
            if factor is not None:
                y *= _load_vector(factor + c * WIDTH, TOKENS, WIDTH, LANES, VECTOR)
            if offset is not None:
                y += _load_vector(offset + c * WIDTH, TOKENS, WIDTH, LANES, VECTOR)
            if rotation is not None:
                y = tl.dot(tl.reshape(y.to(tl.float16), (ROWS, BLOCK)), matrix)
                y = tl.reshape(y, (TOKENS, WIDTH))
            results += (y,)  # type: ignore[assignment]
        scale = _largest(results, CHUNKS)
        if rotation is not None:
            scale_of_product = scale_of_vectors
            if offset is None:
                scale_of_product = scale_of_vectors * _power_of_two(exponent - 14)
            scale *= scale_of_product
        if clip is not None:
            scale *= tl.load(clip)
        # Where nothing but these divisions rounds, they round as the reference's.
        if rotation is not None:
            scale = _larger(scale * (1.0 / LARGEST), _SMALLEST_SCALE)
            steps = scale_of_product / scale
        else:
            scale = _larger(tl.math.div_rn(scale, LARGEST * 1.0), _SMALLEST_SCALE)
            steps = tl.math.div_rn(1.0, scale)
        for c in tl.static_range(CHUNKS):
            y = results[c]
            if clip is not None:
                # To 0 .. 1, which the instruction that multiplies and adds does by itself.
                y = tl.clamp(y * (steps * (0.5 / LARGEST))[:, None] + 0.5, 0.0, 1.0)
                y = y * (2.0 * LARGEST) + (_ROUNDING - LARGEST)
            else:
                y = y * steps[:, None] + _ROUNDING
            integers = y.to(tl.int32, bitcast=True).to(tl.int8)
            if rotation is not None:
                integers = tl.reshape(integers, (ROWS // 16, 2, 8, BLOCK // GROUP, GROUP // 8, 4, 2))
                integers = tl.permute(integers, (0, 2, 3, 1, 5, 4, 6))
                integers = tl.reshape(integers, (ROWS // 2, BLOCK // GROUP, 2, GROUP))
            else:
                integers = tl.reshape(integers, (TOKENS, WIDTH // LANES, LANES))
            target = codes + start.to(tl.int64) * D + outputs + c * WIDTH
            if CHUNKS * WIDTH > D:
                tl.store(target, integers, mask=places + c * WIDTH < D)
            else:
                tl.store(target, integers)
        tl.store(token_scale + start + token, scale)


def block_width(d: int, rotation: Tensor | None) -> int:
    """Width of the blocks that pieces are made of."""
    return min(d & -d, PLAIN_BLOCK) if rotation is None else len(rotation)


def choose_config(d: int, block: int, *, rotated: bool) -> Config:
    """By shape, the fastest measured."""
    blocks = d // block
    slots = triton.next_power_of_2(blocks)
    if rotated:
        if slots * block > PIECE:
            return Config(1, PIECE // block, num_warps=8, programs=2, max_registers=128)
        # Three, not four: their shared memory leaves L1 room for the vectors.
        return Config(PIECE // (slots * block), slots, num_warps=4, programs=3, max_registers=168, prefetch=True)
    third = triton.next_power_of_2(triton.cdiv(blocks, 3))
    chunks, slots = (3, third) if 3 * third < slots else (1, slots)
    tokens = 1 << max(0, (PLAIN_TILE // (chunks * slots * block)).bit_length() - 1)
    if tokens * chunks * slots * block > PIECE:
        return Config(tokens, slots, num_warps=8, programs=2, max_registers=128)
    return Config(tokens, slots, num_warps=4, programs=4, max_registers=128)


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
    block = block_width(d, rotation)
    config = config or choose_config(d, block, rotated=rotation is not None)
    if rotation is not None and config.tokens == 2 and config.num_warps > 4:
        # Seen on an H100 with triton 3.6.0: nearly all codes wrong; 1, 4 and 8 tokens are right with as many warps.
        raise ValueError(f"{config} gives wrong codes; 2 tokens take at most 4 warps")
    width = config.slots * block
    chunks = triton.cdiv(d, width)
    vector = min(16 // x.element_size(), width)
    lanes = min(width, 32 * vector * max(1, config.num_warps // config.tokens))
    codes = torch.empty((num_tokens, d), dtype=torch.int8, device=x.device)
    token_scale = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    programs = config.programs * architecture(x.device).num_multiprocessors
    with launching(x):
        factor, offset, unit = _vectors(channel_scale, norm, rotation, d=d, width=chunks * width, order=(lanes, vector))
        _quantize_input[(min(triton.cdiv(num_tokens, config.tokens), programs),)](
            x,
            factor,
            offset,
            unit,
            None if rotation is None else rotation.contiguous(),
            clip,
            codes,
            token_scale,
            x.stride(0),
            num_tokens,
            0.0 if norm is None else norm.eps,
            D=d,
            BLOCK=block,
            TOKENS=config.tokens,
            SLOTS=config.slots,
            CHUNKS=chunks,
            LANES=lanes,
            VECTOR=vector,
            GROUP=_group(config, block),
            LARGEST=max_code(bits),
            PREFETCH=config.prefetch,
            num_warps=config.num_warps,
            num_stages=1,
            maxnreg=config.max_registers,
        )
    return codes, token_scale


def _group(config: Config, block: int) -> int:
    # Warps divide the product's rows by 16, from four on its columns: each has at most 64 of them in a row of registers.
    row_warps = min(config.num_warps, max(4, config.tokens * config.slots // 16))
    return min(block, 64, max(16, block * row_warps // config.num_warps))


def _vectors(
    channel_scale: Tensor | None,
    norm: Norm | None,
    rotation: Tensor | None,
    *,
    d: int,
    width: int,
    order: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    # Factor, offset and unit for `_quantize_input`; on the device that is current.
    if channel_scale is None and norm is None:
        return None, None, None
    given = channel_scale if norm is None else norm.scale_plus_one
    assert given is not None
    buffer = torch.empty(2 * width + 1, dtype=torch.float32, device=given.device)
    factor, offset, unit = buffer[:width], buffer[width : 2 * width], buffer[2 * width :]
    _prepare_vectors[(1,)](
        None if norm is None else norm.scale_plus_one.contiguous(),
        None if norm is None else norm.shift.contiguous(),
        None if channel_scale is None else channel_scale.contiguous(),
        factor,
        offset,
        unit,
        D=d,
        WIDTH=width,
        SIZE=triton.next_power_of_2(width),
        LANES=order[0],
        VECTOR=order[1],
        SCALED=rotation is not None,
        num_warps=16,
    )
    return factor, None if norm is None else offset, None if rotation is None else unit
