"""Attention in 8 bits in Triton, on Hopper: INT8 scores, and values in e4m3 (or, with `int8_16`, in the inputs' own 16 bits).

One program takes `ROWS` queries of one head and walks blocks of keys in the order of the head's kind; both kinds of head run
in one launch, since keys and values were written in that order before:

    block     0 … first    left       middle     right   … blocks of the video | text_from …
    visited              | masked | every pair | masked |                      | masked at its end

Queries are read where they are and quantized on the way in, a scale a token: the left operand of the first product stays in
registers. Weights lie in (0, 256], so that the largest of a row is exact in e4m3; the factor cancels in the normalization.
The sum over a block of keys is made by the tensor cores and added in float32 (`PROMOTE`), because their own sums of e4m3
products keep about 14 bits; without, they carry the sum through all blocks.

Keys and values are quantized by kernels bound by memory, into:

    position  0 … num_video | zeros … padded_video | text … | zeros … length      (`padded_video`, `length`: multiples of 128)

| tensor | |
|---|---|
| key codes `[H, length, D]` int8 | `(k - shift) / scale` of the token at a position; a scale every 128 positions |
| value codes `[H, D, length]` e4m3 | `(v - shift) / scale`, a shift and a scale a channel; places in groups of 16 as below |

A softmax does not change when one vector is subtracted from every key, and weights that sum to 1 give back what was
subtracted from every value: any shift is right. That of the keys is their mean over every `STRIDE`-th token, enough to take
loud channels away; that of the values is their mean, without which the rounding of weights that are nearly the same would
count for as much as they themselves. Sums run in a fixed order, in two passes.

Places: of 16 positions, the one at place `4 t + 2 i + j` is `8 i + 2 t + j` (t < 4, i and j < 2). A thread of the tensor
cores' first product holds the positions `2 t + j` and `8 + 2 t + j`, and the second product wants it to hold four neighbours.

Shapes: H heads, L = n + m tokens (n of the video, then m of the text), D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reelquant.ops.attention_rows import place_of_program, rows_of_block, seen_from, seen_to, write_rows

CHUNK = 512
"""Tokens of one partial sum."""

_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest integer, ties to even."""
_WEIGHT_BITS = tl.constexpr(8.0)
"""log2 of what the largest weight of a row becomes."""


@triton.jit
def _range(magnitudes):
    """The largest along the last axis, at least 1e-12, NaN where there is one: NaN is above all numbers as an integer."""
    largest = tl.max(magnitudes.to(tl.int32, bitcast=True), len(magnitudes.shape) - 1).to(tl.float32, bitcast=True)
    return tl.maximum(largest, 1e-12, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _attend(
    acc, total, peak, queries, query_scale, keys, key_scale, values, head, length,
    begin, count, other_begin, other_count, last_begin, last_count, low, high, text_from, text_end, num_video,
    COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    MASKED: tl.constexpr, OUTSIDE: tl.constexpr, EIGHT_BIT_VALUES: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    """`(acc, total, peak)` after `count` blocks of keys from block `begin` on, `other_count` from `other_begin`, and the last.

    With MASKED a row sees the positions from `low` up to, not including, `high` (OUTSIDE: the video's others), and the text.
    """
    for block in tl.range(0, count + other_count + last_count):
        place = tl.where(
            block < count,
            begin + block,
            tl.where(
                block < count + other_count, other_begin + block - count, last_begin + block - count - other_count
            ),
        )
        start = place * COLUMNS
        tile = keys.load([head * length + start, 0])
        scores = tl.dot(queries, tile.T, out_dtype=tl.int32).to(tl.float32)
        scale = query_scale * tl.load(key_scale + head * (length // GROUP) + start // GROUP)
        if MASKED:
            position = start + tl.arange(0, COLUMNS)
            if OUTSIDE:
                seen = (position[None, :] < low[:, None]) | (position[None, :] >= high[:, None])
                seen = seen & (position < num_video)[None, :]
            else:
                seen = (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
                seen = seen | ((position >= text_from) & (position < text_end))[None, :]
            scores = tl.where(seen, scores, -float("inf"))
        raised = tl.maximum(peak, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale[:, None] - (raised - _WEIGHT_BITS)[:, None])
        decay = tl.exp2(peak - raised)
        total = total * decay + tl.sum(weights, 1)
        tile = values.load([head * HEAD_DIM, start])
        if EIGHT_BIT_VALUES:
            # In this order a thread holds, for the second product, what the first left in it; the values are stored so too.
            ROWS: tl.constexpr = acc.shape[0]
            ordered = tl.reshape(weights.to(tl.float8e4nv), (ROWS, COLUMNS // 16, 2, 4, 2))
            ordered = tl.reshape(tl.permute(ordered, (0, 1, 3, 2, 4)), (ROWS, COLUMNS))
        else:
            ordered = weights.to(tile.dtype)
        acc = acc * decay[:, None]
        if PROMOTE:
            acc += tl.dot(ordered, tile.T)
        else:
            acc = tl.dot(ordered, tile.T, acc)
        peak = raised
    return acc, total, peak


@triton.jit(do_not_specialize=["num_heads", "num_video", "num_text", "frames", "places", "width"])
def eight_bit_attention_kernel(
    q, keys, key_scale, values, value_scale, value_mean, temporal, out, dense_out,
    rows_a, scales_a, directions_a, rows_b, scales_b, directions_b,
    q_head, q_stride, out_head, out_stride, dense_head, dense_stride,
    rows_a_head, rows_a_stride, rows_b_head, rows_b_stride,
    num_heads, num_video, num_text, text_from, length, frames, places, width, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    EIGHT_BIT_VALUES: tl.constexpr, PROMOTE: tl.constexpr, BOTH: tl.constexpr,
    RANK_A: tl.constexpr, RANK_B: tl.constexpr,
):  # fmt: skip
    """See the module. Grid: one program a head and block of queries, those of the text first: they run longest."""
    is_text, index, blocks = place_of_program(num_heads, num_video, num_text, ROWS)
    head = index // blocks
    wide_head = head.to(tl.int64)
    first, last, row, stored, reach = rows_of_block(is_text, index % blocks, num_video, num_text, width, ROWS)
    turned = tl.load(temporal + head) != 0
    token = tl.where(is_text, num_video + row, tl.where(turned, row % frames * places + row // frames, row)).to(
        tl.int64
    )
    exact = tl.load(q + wide_head * q_head + token[:, None] * q_stride + tl.arange(0, HEAD_DIM)[None, :]).to(tl.float32)
    largest = _range(tl.abs(exact))
    queries = (exact * (127.0 / largest)[:, None] + _ROUND - _ROUND).to(tl.int8)
    query_scale = largest * (scale / 127.0)

    low, high = seen_from(row, reach), seen_to(row, reach, num_video)
    begin, end = seen_from(first, reach), seen_to(last, reach, num_video)
    left_from, right_to = begin // COLUMNS, tl.cdiv(end, COLUMNS)
    middle_from = tl.cdiv(seen_from(last, reach), COLUMNS)
    middle_to = tl.maximum(seen_to(first, reach, num_video) // COLUMNS, middle_from)
    text_end = text_from + num_text

    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -1e38, tl.float32)
    acc, total, peak = _attend(
        acc, total, peak, queries, query_scale, keys, key_scale, values, head, length,
        middle_from, middle_to - middle_from, text_from // COLUMNS, num_text // COLUMNS, 0, 0,
        low, high, text_from, text_end, num_video,
        COLUMNS, HEAD_DIM, GROUP, False, False, EIGHT_BIT_VALUES, PROMOTE,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, queries, query_scale, keys, key_scale, values, head, length,
        left_from, middle_from - left_from, middle_to, right_to - middle_to,
        text_from // COLUMNS + num_text // COLUMNS, tl.cdiv(num_text, COLUMNS) - num_text // COLUMNS,
        low, high, text_from, text_end, num_video,
        COLUMNS, HEAD_DIM, GROUP, True, False, EIGHT_BIT_VALUES, PROMOTE,
    )  # fmt: skip
    column = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    by, plus = tl.load(value_scale + column), tl.load(value_mean + column)
    write_rows(
        out, out_head, out_stride, acc * by[None, :] + total[:, None] * plus[None, :], total,
        wide_head, token, stored, num_video + num_text,
        rows_a, rows_a_head, rows_a_stride, scales_a, directions_a,
        rows_b, rows_b_head, rows_b_stride, scales_b, directions_b,
        HEAD_DIM, RANK_A, RANK_B,
    )  # fmt: skip
    if BOTH:
        whole = num_video // COLUMNS
        acc, total, peak = _attend(
            acc, total, peak, queries, query_scale, keys, key_scale, values, head, length,
            0, left_from, right_to, tl.maximum(whole - right_to, 0), 0, 0, low, high, text_from, text_end, num_video,
            COLUMNS, HEAD_DIM, GROUP, False, False, EIGHT_BIT_VALUES, PROMOTE,
        )  # fmt: skip
        tail_from = tl.maximum(right_to, whole)
        acc, total, peak = _attend(
            acc, total, peak, queries, query_scale, keys, key_scale, values, head, length,
            left_from, middle_from - left_from, middle_to, right_to - middle_to,
            tail_from, tl.cdiv(num_video, COLUMNS) - tail_from, low, high, text_from, text_end, num_video,
            COLUMNS, HEAD_DIM, GROUP, True, True, EIGHT_BIT_VALUES, PROMOTE,
        )  # fmt: skip
        write_rows(
            dense_out, dense_head, dense_stride, acc * by[None, :] + total[:, None] * plus[None, :], total,
            wide_head, token, stored, num_video + num_text,
            rows_a, rows_a_head, rows_a_stride, scales_a, directions_a,
            rows_b, rows_b_head, rows_b_stride, scales_b, directions_b,
            HEAD_DIM, 0, 0,
        )  # fmt: skip


@triton.jit
def value_places(place):
    """The position within its 16 of what lies at `place`; see the module."""
    inside = place % 16
    return place - inside + inside % 4 // 2 * 8 + inside // 4 * 2 + inside % 2


@triton.jit(do_not_specialize=["num_tokens"])
def partial_statistics(
    k, v, partial, k_head, k_stride, v_head, v_stride, num_tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """`partial[chunk, 4, head, DIM]`: sums of k (every `STRIDE`-th token) and of v, least and greatest v.

    Grid: chunks, heads.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, DIM)
    counted = chunk * CHUNK + tl.arange(0, CHUNK // STRIDE) * STRIDE
    places = counted.to(tl.int64)[:, None] * k_stride + column[None, :]
    keys = tl.load(k + head.to(tl.int64) * k_head + places, mask=(counted < num_tokens)[:, None], other=0.0)
    least = tl.full([DIM], float("inf"), tl.float32)
    greatest = tl.full([DIM], -float("inf"), tl.float32)
    sums = tl.zeros([DIM], tl.float32)
    for start in tl.range(0, CHUNK, TOKENS):
        token = chunk * CHUNK + start + tl.arange(0, TOKENS)
        inside = (token < num_tokens)[:, None]
        pointers = v + head.to(tl.int64) * v_head + token.to(tl.int64)[:, None] * v_stride + column[None, :]
        values = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(values, 0)
        least = tl.minimum(least, tl.min(tl.where(inside, values, float("inf")), 0))
        greatest = tl.maximum(greatest, tl.max(tl.where(inside, values, -float("inf")), 0))
    target = partial + (chunk * 4 * HEADS + head) * DIM + column
    tl.store(target, tl.sum(keys.to(tl.float32), 0))
    tl.store(target + HEADS * DIM, sums)
    tl.store(target + 2 * HEADS * DIM, least)
    tl.store(target + 3 * HEADS * DIM, greatest)


@triton.jit(do_not_specialize=["num_chunks", "num_keys", "num_values"])
def final_statistics(
    partial, key_shift, value_shift, value_scale, num_chunks, num_keys, num_values,
    HEADS: tl.constexpr, DIM: tl.constexpr, LARGEST: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """`[HEADS, DIM]` three times. Grid: heads."""
    head = tl.program_id(0)
    column = tl.arange(0, DIM)
    key_sums = tl.zeros([DIM], tl.float32)
    value_sums = tl.zeros([DIM], tl.float32)
    least = tl.full([DIM], float("inf"), tl.float32)
    greatest = tl.full([DIM], -float("inf"), tl.float32)
    for start in tl.range(0, num_chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < num_chunks)[:, None]
        source = partial + (chunk * 4 * HEADS + head)[:, None] * DIM + column[None, :]
        key_sums += tl.sum(tl.load(source, mask=inside, other=0.0), 0)
        value_sums += tl.sum(tl.load(source + HEADS * DIM, mask=inside, other=0.0), 0)
        least = tl.minimum(least, tl.min(tl.load(source + 2 * HEADS * DIM, mask=inside, other=float("inf")), 0))
        greatest = tl.maximum(greatest, tl.max(tl.load(source + 3 * HEADS * DIM, mask=inside, other=-float("inf")), 0))
    shift = value_sums / num_values
    largest = tl.maximum(greatest - shift, shift - least)
    tl.store(key_shift + head * DIM + column, key_sums / num_keys)
    tl.store(value_shift + head * DIM + column, shift)
    tl.store(value_scale + head * DIM + column, tl.maximum(largest, 1e-12) / LARGEST)


@triton.jit(do_not_specialize=["num_video", "num_text", "frames", "places"])
def quantize_keys_values_kernel(
    k, v, key_shift, value_shift, value_scale, temporal, key_codes, key_scales, value_codes,
    k_head, k_stride, v_head, v_stride, num_video, num_text, padded_video, length, frames, places,
    DIM: tl.constexpr, GROUP: tl.constexpr, EIGHT_BIT_VALUES: tl.constexpr,
):  # fmt: skip
    """A group of positions of one head. Grid: groups, heads."""
    group, head = tl.program_id(0), tl.program_id(1)
    wide_head = head.to(tl.int64)
    column = tl.arange(0, DIM)
    slot = tl.arange(0, GROUP)
    start = group * GROUP
    is_text = start >= padded_video
    turned = tl.load(temporal + head) != 0

    position = start + slot
    inside = tl.where(is_text, position < padded_video + num_text, position < num_video)
    of_video = tl.where(turned, position % frames * places + position // frames, position)
    token = tl.where(is_text, position - padded_video + num_video, of_video).to(tl.int64)
    exact = tl.load(
        k + wide_head * k_head + token[:, None] * k_stride + column[None, :], mask=inside[:, None], other=0.0
    )
    shifted = exact.to(tl.float32) - tl.load(key_shift + head * DIM + column)[None, :]
    shifted = tl.where(inside[:, None], shifted, 0.0)
    largest = _range(_range(tl.abs(shifted)))
    codes = (shifted * (127.0 / largest) + _ROUND - _ROUND).to(tl.int8)
    tl.store(key_codes + (wide_head * length + position)[:, None] * DIM + column[None, :], codes)
    tl.store(key_scales + head * (length // GROUP) + group, largest / 127.0)

    position = start + slot
    if EIGHT_BIT_VALUES:
        position = start + value_places(slot)
    inside = tl.where(is_text, position < padded_video + num_text, position < num_video)
    of_video = tl.where(turned, position % frames * places + position // frames, position)
    token = tl.where(is_text, position - padded_video + num_video, of_video).to(tl.int64)
    exact = tl.load(
        v + wide_head * v_head + token[:, None] * v_stride + column[None, :], mask=inside[:, None], other=0.0
    )
    values = exact
    if EIGHT_BIT_VALUES:
        shift, by = tl.load(value_shift + head * DIM + column), tl.load(value_scale + head * DIM + column)
        scaled = (exact.to(tl.float32) - shift[None, :]) * (1.0 / by)[None, :]
        scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
        values = tl.where(inside[:, None], scaled, 0.0).to(value_codes.dtype.element_ty)
    target = value_codes + (wide_head * DIM + column)[:, None] * length + (start + slot)[None, :]
    tl.store(target, tl.trans(values))
