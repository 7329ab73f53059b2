"""Fake quantization and its gradients in Triton, one pass over memory each way.

A program takes one row, in chunks of `[GROUPS, GROUP]` that give a thread 16 bytes each: at most 32 values of 512 threads each.
Widths that are no power of two, as 3072 and 12,288, are 3 chunks (6 of float32), and waste nothing. The forward pass holds the
row in registers. The backward pass holds the gradient that is passed on, and reads `x` a second time, from L1 or L2. Rows
without group scales are the case of one step for all groups. What a row sums is summed in an order of its own, without atomics:
the same bits every time.

The forward pass gives the reference's bits: quotients are rounded as IEEE says, and so is everything after them. The order of
sums is free, which touches gradients, and of two group scales of equal squared error the choice.

Bytes an element that a learning step reads and writes, forward and backward, counted on the meta device, and the time at
3.0 TB/s:

| | reference | kernels | predicted |
|---|---|---|---|
| rows of bf16 | 56 + 154 | 4 + 6 | 57,856 x 3072: 0.59 ms, was 12.4; 57,856 x 12,288: 2.4 ms, was 50 |
| rows of float32 | 44 + 142 | 8 + 12 | 12,288 x 3072: 0.25 ms, was 2.3 |
| two levels of float32 | 178 + 150 | 8 + 12 | 12,288 x 3072: 0.25 ms, was 4.1 |

Compiled for sm_90 by triton 3.6.0, at widths of whole chunks, they take at most 98 registers a thread and 8 bytes of stack.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelquant.ops.architecture import launching
from reelquant.ops.fake_quantization.reference import LARGEST_INT8, ROW_GROUP, SMALLEST_SCALE, gradients, results

MOST_WARPS = 16
MOST_VALUES = 32
"""Of a thread."""
LOAD_BYTES = 16
"""Of a thread in a chunk."""
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)
_ROUNDING = tl.constexpr(8388608.0)
"""2^23: what is added to it, from 0 to 2^22, is rounded to an integer, ties to even."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _signed(magnitude, sign_of):
    # Zeros keep their sign, as in torch.
    bits = magnitude.to(tl.int32, bitcast=True) | (sign_of.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _code(steps, LARGEST: tl.constexpr):
    # LARGEST is an integer: to clamp first is the same.
    magnitude = tl.minimum(tl.abs(steps), LARGEST * 1.0, propagate_nan=tl.PropagateNan.ALL)
    return _signed((magnitude + _ROUNDING) - _ROUNDING, steps)


@triton.jit
def _load_piece(row, columns, c: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr):
    SIZE: tl.constexpr = columns.shape[0] * columns.shape[1]
    places = c * SIZE + columns
    return tl.load(row + places, mask=places < D, other=0.0) if CHUNKS * SIZE > D else tl.load(row + places)


@triton.jit
def _store_piece(row, columns, c: tl.constexpr, values, D: tl.constexpr, CHUNKS: tl.constexpr):
    SIZE: tl.constexpr = columns.shape[0] * columns.shape[1]
    places = c * SIZE + columns
    if CHUNKS * SIZE > D:
        tl.store(row + places, values.to(row.dtype.element_ty), mask=places < D)
    else:
        tl.store(row + places, values.to(row.dtype.element_ty))


@triton.jit
def _fit_group_scale(values, largest_value, scale, LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr):
    """The integers `[GROUPS]` of the groups, and `values` rounded with them."""
    amax = tl.max(tl.abs(values), 1)
    ratio = tl.math.div_rn(amax, _larger(largest_value, _SMALLEST_NORMAL) + tl.zeros_like(amax))
    above = tl.minimum(tl.maximum(tl.ceil(ratio * LARGEST_SCALE), 1.0), LARGEST_SCALE * 1.0)
    below = tl.maximum(above - 1, 1.0)
    step = (below * scale)[:, None] + tl.zeros_like(values)
    rounded_below = _code(tl.math.div_rn(values, step), LARGEST) * step
    error_below = tl.sum((rounded_below - values) * (rounded_below - values), 1)
    step = (above * scale)[:, None] + tl.zeros_like(values)
    rounded_above = _code(tl.math.div_rn(values, step), LARGEST) * step
    error_above = tl.sum((rounded_above - values) * (rounded_above - values), 1)
    takes_below = error_below < error_above
    return tl.where(takes_below, below, above), tl.where(takes_below[:, None], rounded_below, rounded_above)


@triton.jit
def _fake_quantize(
    x, clip, out, amax, group_scale,
    D: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr,
    LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr, CLIP_STRIDE: tl.constexpr,
):  # fmt: skip
    NUM_GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pieces = ()
    largest = tl.zeros([GROUPS, GROUP], tl.float32)
    for c in tl.static_range(CHUNKS):
        pieces += (_load_piece(x + row * D, columns, c, D, CHUNKS),)  # type: ignore[assignment]
        largest = _larger(largest, tl.abs(pieces[c].to(tl.float32)))
    largest_value = tl.reduce(tl.reduce(largest, 1, _larger), 0, _larger)
    tl.store(amax + row, largest_value)
    reach = largest_value * tl.load(clip + row * CLIP_STRIDE)
    scale = _larger(tl.math.div_rn(reach, LARGEST * LARGEST_SCALE * 1.0), _SMALLEST_SCALE)
    for c in tl.static_range(CHUNKS):
        values = pieces[c].to(tl.float32)  # type: ignore[var-annotated]
        if group_scale is None:
            rounded = _code(tl.math.div_rn(values, scale + tl.zeros_like(values)), LARGEST) * scale
        else:
            chosen, rounded = _fit_group_scale(values, largest_value, scale, LARGEST, LARGEST_SCALE)
            group = c * GROUPS + tl.arange(0, GROUPS)
            tl.store(group_scale + row * NUM_GROUPS + group, chosen.to(tl.uint8), mask=group < NUM_GROUPS)
        _store_piece(out + row * D, columns, c, rounded, D, CHUNKS)


@triton.jit
def _fake_quantize_backward(
    grad, x, clip, amax, group_scale, grad_x, grad_clip,
    D: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr,
    LARGEST: tl.constexpr, LARGEST_SCALE: tl.constexpr, CLIP_STRIDE: tl.constexpr,
):  # fmt: skip
    NUM_GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    largest_value, factor = tl.load(amax + row), tl.load(clip + row * CLIP_STRIDE)
    quotient = tl.math.div_rn(largest_value * factor, LARGEST * LARGEST_SCALE * 1.0)
    scale = _larger(quotient, _SMALLEST_SCALE)
    of_scale = tl.zeros([GROUPS], tl.float32)
    num_largest = tl.zeros([GROUPS], tl.float32)
    passed = ()
    for c in tl.static_range(CHUNKS):
        values = _load_piece(x + row * D, columns, c, D, CHUNKS).to(tl.float32)
        upstream = _load_piece(grad + row * D, columns, c, D, CHUNKS).to(tl.float32)
        if group_scale is None:
            step = scale + tl.zeros_like(values)
        else:
            group = c * GROUPS + tl.arange(0, GROUPS)
            chosen = tl.load(group_scale + row * NUM_GROUPS + group, mask=group < NUM_GROUPS, other=1).to(tl.float32)
            step = (chosen * scale)[:, None] + tl.zeros_like(values)
        steps = tl.math.div_rn(values, step)
        # The tie at LARGEST, an odd number, goes to the even one beyond it.
        inside = (tl.abs(steps) < LARGEST + 0.5).to(tl.float32)
        of_step = tl.sum((_code(steps, LARGEST) - steps * inside) * upstream, 1)
        if group_scale is not None:
            of_step *= chosen
        of_scale += of_step
        attained = tl.abs(values) == largest_value
        if CHUNKS * GROUPS * GROUP > D:
            attained = attained & (c * GROUPS * GROUP + columns < D)
        num_largest += tl.sum(attained.to(tl.float32), 1)
        passed += ((upstream * inside).to(grad.dtype.element_ty),)  # type: ignore[assignment]
    of_quotient = tl.sum(of_scale, 0)
    if group_scale is None:
        of_quotient *= (quotient >= _SMALLEST_SCALE).to(tl.float32)
    else:
        of_quotient = tl.where(quotient >= _SMALLEST_SCALE, of_quotient, 0.0)
    of_quotient = tl.math.div_rn(of_quotient, LARGEST * LARGEST_SCALE * 1.0)
    tl.store(grad_clip + row, of_quotient * largest_value)
    if grad_x is not None:
        share = tl.math.div_rn(of_quotient * factor, tl.sum(num_largest, 0))
        for c in tl.static_range(CHUNKS):
            # From L1 or L2: held since, a row of float32 would exceed the registers.
            values = _load_piece(x + row * D, columns, c, D, CHUNKS).to(tl.float32)
            # A share that is not finite makes the row NaN, as it does times zero in torch.
            attained = (tl.abs(values) == largest_value).to(tl.float32)
            sign = tl.where(values > 0, 1.0, tl.where(values < 0, -1.0, 0.0))
            _store_piece(grad_x + row * D, columns, c, passed[c].to(tl.float32) + share * attained * sign, D, CHUNKS)


def launch_fake_quantize(x: Tensor, clip: Tensor, largest: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.results`; arguments as checked by `op`: `clip` float32, one or one a row; `group_size` 0 for none."""
    out, amax, group_scale = results(x, group_size)
    with launching(x):
        _fake_quantize[(len(amax),)](
            x, clip, out, amax, group_scale if group_size else None, **_tiles(x, clip, largest, group_size)
        )
    return out, amax, group_scale


def launch_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    clip: Tensor,
    amax: Tensor,
    group_scale: Tensor | None,
    largest: int,
    group_size: int,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.gradients`; `grad` contiguous, the others as given to and returned by `launch_fake_quantize`."""
    grad_x, grad_clip = gradients(x, of_x)
    tiles = _tiles(x, clip, largest, group_size)
    # Two programs of 16 warps share a multiprocessor where 64 registers are enough: one loads while the other waits.
    whole = tiles["CHUNKS"] * tiles["GROUPS"] * tiles["GROUP"] == tiles["D"]
    fits = x.element_size() == 2 and tiles["CHUNKS"] <= 3 and whole
    with launching(x):
        _fake_quantize_backward[(len(amax),)](
            grad, x, clip, amax, group_scale, grad_x if of_x else None, grad_clip, **tiles, maxnreg=64 if fits else None
        )  # fmt: skip
    return grad_x, grad_clip


def _tiles(x: Tensor, clip: Tensor, largest: int, group_size: int) -> dict[str, int]:
    width, group = x.shape[-1], group_size or ROW_GROUP
    num_warps = 1
    while num_warps < MOST_WARPS and width > MOST_VALUES * 32 * num_warps:
        num_warps *= 2
    chunk = 32 * num_warps * LOAD_BYTES // x.element_size()
    return {
        "D": width,
        "GROUPS": chunk // group,
        "GROUP": group,
        "CHUNKS": triton.cdiv(width, chunk),
        "LARGEST": largest,
        "LARGEST_SCALE": LARGEST_INT8 // largest if group_size else 1,
        "CLIP_STRIDE": 0 if clip.numel() == 1 else 1,
        "num_warps": num_warps,
    }
