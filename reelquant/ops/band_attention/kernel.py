"""Band attention in Triton, for bf16 and fp16 on CUDA: no mask tensor, no reordered copy of q, k or v.

One program takes `ROWS` queries of one head, neighbours in the order of the head's kind, and walks the keys in that order:

    position     0 … begin    left      middle      right    … num_video | text
    visited                 | masked | every pair | masked |             | masked at its end

Text queries are programs like the others whose band is all keys; they run longest and start first. A position p of a
temporal head is token `(p % frames) * places + p // frames`. Rows reach the tile in one of two ways (`load`):

| load | how | where |
|---|---|---|
| `tma` | boxes of the tensor memory accelerator, of a temporal head `[frames, places]` tokens, frame by frame | Hopper |
| `pointers` | an address a row | everywhere, any number of frames |

Shapes: H heads, L = n + m tokens (n of the video, then m of the text), D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reelquant.ops.attention_rows import place_of_program, rows_of_block, seen_from, seen_to, write_rows


@triton.jit
def _tile(
    source, stride, head, start, offsets, bound, places,
    FRAMES: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr,
    LOAD: tl.constexpr, INSIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`[COLUMNS, HEAD_DIM]`, the rows at positions `start + offsets`; what lies beyond `bound` is anything finite."""
    if LOAD == "pointers":
        position = start + offsets
        if MASKED:
            position = tl.minimum(position, bound - 1)
        token = (position % FRAMES * places + position // FRAMES).to(tl.int64)
        rows = tl.load(source + token[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :])
    elif LOAD == "box":
        if INSIDE:
            rows = source.load([0, start // FRAMES, head, 0]).reshape(COLUMNS, HEAD_DIM)
        else:
            rows = source.load([head, 0, start // FRAMES, 0]).reshape(COLUMNS, HEAD_DIM)
    else:
        if INSIDE:
            rows = source.load([start, head, 0]).reshape(COLUMNS, HEAD_DIM)
        else:
            rows = source.load([head, start, 0]).reshape(COLUMNS, HEAD_DIM)
    return rows


@triton.jit
def _attend(
    acc, total, peak, q, k, v, k_stride, v_stride, head,
    begin, count, other_begin, other_count, low, high, offsets, bound, places, scale,
    FRAMES: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr,
    LOAD: tl.constexpr, K_INSIDE: tl.constexpr, V_INSIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`(acc, total, peak)` after `count` blocks of keys from `begin` and `other_count` from `other_begin`.

    With MASKED a row sees the positions from `low` up to, not including, `high`; `peak` stays finite before it sees any.
    """
    for block in tl.range(0, count + other_count):
        start = tl.where(block < count, begin + block * COLUMNS, other_begin + (block - count) * COLUMNS)
        keys = _tile(
            k, k_stride, head, start, offsets, bound, places, FRAMES, COLUMNS, HEAD_DIM, LOAD, K_INSIDE, MASKED
        )  # fmt: skip
        scores = tl.dot(q, keys.T)
        if MASKED:
            position = start + offsets
            seen = (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        raised = tl.maximum(peak, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - raised[:, None])
        decay = tl.exp2(peak - raised)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        values = _tile(
            v, v_stride, head, start, offsets, bound, places, FRAMES, COLUMNS, HEAD_DIM, LOAD, V_INSIDE, MASKED
        )  # fmt: skip
        acc = tl.dot(weights.to(values.dtype), values, acc)
        peak = raised
    return acc, total, peak


@triton.jit(do_not_specialize=["num_heads", "num_video", "num_text", "places", "width"])
def band_attention_kernel(
    q, k, v, k_box, v_box, out, dense_out, heads, rows_a, scales_a, directions_a, rows_b, scales_b, directions_b,
    q_head, q_stride, k_head, k_stride, v_head, v_stride, out_head, out_stride, dense_head, dense_stride,
    rows_a_head, rows_a_stride, rows_b_head, rows_b_stride,
    num_heads, num_video, num_text, places, width, scale,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr,
    K_INSIDE: tl.constexpr, V_INSIDE: tl.constexpr, BOTH: tl.constexpr, RANK_A: tl.constexpr, RANK_B: tl.constexpr,
):  # fmt: skip
    """See the module. `FRAMES` is 1 for spatial heads: position and token are the same then. Grid: one program a block."""
    is_text, index, blocks = place_of_program(num_heads, num_video, num_text, ROWS)
    head = tl.load(heads + index // blocks)
    wide_head = head.to(tl.int64)
    first, last, row, stored, reach = rows_of_block(is_text, index % blocks, num_video, num_text, width, ROWS)
    token = tl.where(is_text, num_video + row, row % FRAMES * places + row // FRAMES).to(tl.int64)
    queries = tl.load(q + wide_head * q_head + token[:, None] * q_stride + tl.arange(0, HEAD_DIM)[None, :])
    low, high = seen_from(row, reach), seen_to(row, reach, num_video)

    MAIN: tl.constexpr = "box" if LOAD == "tma" and FRAMES > 1 else LOAD
    ALIGN: tl.constexpr = FRAMES if MAIN == "box" else 1
    if LOAD == "pointers":
        k += wide_head * k_head
        v += wide_head * v_head
        k_main, v_main = k, v
    else:
        k_main, v_main = k_box, v_box
    in_order = tl.arange(0, COLUMNS)
    wide: tl.constexpr = COLUMNS // ALIGN
    offsets = in_order % wide * FRAMES + in_order // wide if MAIN == "box" else in_order

    begin = seen_from(first, reach)
    full_from, full_to = seen_from(last, reach), seen_to(first, reach, num_video)
    end = seen_to(last, reach, num_video)
    left_from = begin // ALIGN * ALIGN
    left = tl.cdiv(full_from - left_from, COLUMNS)
    middle_from = left_from + left * COLUMNS
    middle = tl.maximum(full_to - middle_from, 0) // COLUMNS
    right_from = middle_from + middle * COLUMNS
    right = tl.cdiv(tl.maximum(end - right_from, 0), COLUMNS)

    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -1e38, tl.float32)
    acc, total, peak = _attend(
        acc, total, peak, queries, k_main, v_main, k_stride, v_stride, head,
        middle_from, middle, 0, 0, low, high, offsets, num_video, places, scale,
        FRAMES, COLUMNS, HEAD_DIM, MAIN, K_INSIDE, V_INSIDE, False,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, queries, k_main, v_main, k_stride, v_stride, head,
        left_from, left, right_from, right, low, high, offsets, num_video, places, scale,
        FRAMES, COLUMNS, HEAD_DIM, MAIN, K_INSIDE, V_INSIDE, True,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, queries, k, v, k_stride, v_stride, head,
        num_video, tl.cdiv(num_text, COLUMNS), 0, 0, low * 0, low * 0 + num_video + num_text, in_order,
        num_video + num_text, places, scale,
        1, COLUMNS, HEAD_DIM, LOAD, K_INSIDE, V_INSIDE, True,
    )  # fmt: skip
    write_rows(
        out, out_head, out_stride, acc, total, wide_head, token, stored, num_video + num_text,
        rows_a, rows_a_head, rows_a_stride, scales_a, directions_a,
        rows_b, rows_b_head, rows_b_stride, scales_b, directions_b,
        HEAD_DIM, RANK_A, RANK_B,
    )  # fmt: skip
    if BOTH:
        left = begin // COLUMNS
        edge_from = full_to // ALIGN * ALIGN
        edge = tl.cdiv(tl.maximum(end - edge_from, 0), COLUMNS)
        right_from = edge_from + edge * COLUMNS
        right = tl.maximum(num_video - right_from, 0) // COLUMNS
        tail_from = right_from + right * COLUMNS
        acc, total, peak = _attend(
            acc, total, peak, queries, k_main, v_main, k_stride, v_stride, head,
            0, left, right_from, right, low, high, offsets, num_video, places, scale,
            FRAMES, COLUMNS, HEAD_DIM, MAIN, K_INSIDE, V_INSIDE, False,
        )  # fmt: skip
        acc, total, peak = _attend(
            acc, total, peak, queries, k_main, v_main, k_stride, v_stride, head,
            left * COLUMNS, tl.cdiv(tl.maximum(full_from - left * COLUMNS, 0), COLUMNS), 0, 0,
            low * 0, low, offsets, num_video, places, scale,
            FRAMES, COLUMNS, HEAD_DIM, MAIN, K_INSIDE, V_INSIDE, True,
        )  # fmt: skip
        acc, total, peak = _attend(
            acc, total, peak, queries, k_main, v_main, k_stride, v_stride, head,
            edge_from, edge, tail_from, tl.cdiv(tl.maximum(num_video - tail_from, 0), COLUMNS),
            high, high * 0 + num_video, offsets, num_video, places, scale,
            FRAMES, COLUMNS, HEAD_DIM, MAIN, K_INSIDE, V_INSIDE, True,
        )  # fmt: skip
        write_rows(
            dense_out, dense_head, dense_stride, acc, total, wide_head, token, stored, num_video + num_text,
            rows_a, rows_a_head, rows_a_stride, scales_a, directions_a,
            rows_b, rows_b_head, rows_b_stride, scales_b, directions_b,
            HEAD_DIM, 0, 0,
        )  # fmt: skip
