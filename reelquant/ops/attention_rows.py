"""What the kernels of attention have in common, in 16 bits and in 8: the queries of a program, the keys they see, the output.

Rows of a correction may be int8 codes with a scale for every `SCALED_TOKENS` tokens, the last time fewer, and every column.

A program takes `ROWS` queries of one head, neighbours in the order of the head's kind; those of the text come first and see all
keys. A query sees the video's positions within its reach, and the text. Both depend on a position monotonously: some query of
a block sees `seen_from(first) … seen_to(last)`, and all of them see `seen_from(last) … seen_to(first)`.

Shapes: D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reelquant.ops.band_attention.reference import SCALED_TOKENS

_SCALED_TOKENS = tl.constexpr(SCALED_TOKENS)


@triton.jit
def place_of_program(num_heads, num_video, num_text, ROWS: tl.constexpr):
    """`(is_text, index, blocks)`: this program's block among those of all heads, of which each has so many."""
    text_blocks, video_blocks = tl.cdiv(num_text, ROWS), tl.cdiv(num_video, ROWS)
    text_programs = num_heads * text_blocks
    is_text = tl.program_id(0) < text_programs
    index = tl.where(is_text, tl.program_id(0), tl.program_id(0) - text_programs)
    return is_text, index, tl.where(is_text, text_blocks, video_blocks)


@triton.jit
def rows_of_block(is_text, block, num_video, num_text, width, ROWS: tl.constexpr):
    """`(first, last, row [ROWS], stored [ROWS], reach)` of a head's block.

    A row counts within the video or within the text; one beyond the last is the last once more, and not `stored`.
    """
    first = block * ROWS
    limit = tl.where(is_text, num_text, num_video)
    last = tl.minimum(first + ROWS, limit) - 1
    reach = tl.where(is_text, num_video + num_text, width)
    row = first + tl.arange(0, ROWS)
    stored = row < limit
    return first, last, tl.minimum(row, limit - 1), stored, reach


@triton.jit
def seen_from(position, reach):
    """The first position of the video that a query at `position`, of the video or the text, sees."""
    return tl.maximum(position - reach + 1, 0)


@triton.jit
def seen_to(position, reach, num_video):
    """The end, not included, of what it sees of the video."""
    return tl.minimum(position + reach, num_video)


@triton.jit
def _corrected(
    result, rows, rows_head, rows_stride, scales, directions, head, token, num_tokens,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """`result [ROWS, HEAD_DIM] + rows @ directions^T`."""
    rank, column = tl.arange(0, RANK), tl.arange(0, HEAD_DIM)
    factors = tl.load(rows + head * rows_head + token[:, None] * rows_stride + rank[None, :])
    if scales is not None:
        group = head * tl.cdiv(num_tokens, _SCALED_TOKENS) + token // _SCALED_TOKENS
        factors = factors.to(tl.float32) * tl.load(scales + group[:, None] * RANK + rank[None, :]).to(tl.float32)
    turned = tl.load(directions + (head * HEAD_DIM + column)[None, :] * RANK + rank[:, None])
    return tl.dot(factors.to(turned.dtype), turned, result)


@triton.jit
def write_rows(
    out, out_head, out_stride, acc, total, head, token, stored, num_tokens,
    rows_a, rows_a_head, rows_a_stride, scales_a, directions_a,
    rows_b, rows_b_head, rows_b_stride, scales_b, directions_b,
    HEAD_DIM: tl.constexpr, RANK_A: tl.constexpr, RANK_B: tl.constexpr,
):  # fmt: skip
    """Normalizes, adds `rows @ directions^T` of up to two terms, and writes the rows that are `stored`."""
    result = acc / total[:, None]
    column = tl.arange(0, HEAD_DIM)
    if RANK_A > 0:
        result = _corrected(
            result, rows_a, rows_a_head, rows_a_stride, scales_a, directions_a, head, token, num_tokens, HEAD_DIM, RANK_A
        )  # fmt: skip
    if RANK_B > 0:
        result = _corrected(
            result, rows_b, rows_b_head, rows_b_stride, scales_b, directions_b, head, token, num_tokens, HEAD_DIM, RANK_B
        )  # fmt: skip
    target = out + head * out_head + token[:, None] * out_stride + column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=stored[:, None])
