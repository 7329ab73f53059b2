"""Column sums of attention maps in Triton, for bf16 and fp16 on CUDA: two passes over tiles of `q k^T`, nothing stored of it.

    pass 1   a program a block of queries:   lse[h, i] = log2 sum_j 2^s_ij       (s in units of log 2)
    pass 2   a program a block of keys:      sums[h, j] = sum_i 2^(s_ij - lse[h, i])
    then     one sum over the heads, in float64

No atomics: the same bits every time. Shapes: H heads, L tokens, D head size.
"""

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelquant.ops.architecture import Architecture, architecture, launching
from reelquant.ops.band_attention.launch import Load, Tile, descriptor, takes_tma

TILES = {64: Tile(128, 128, 8, 3, shared_kib=65), 128: Tile(128, 128, 8, 2, shared_kib=97)}
"""Head size -> tile for Hopper, the fastest of six measured. `rows` stay with the program, `columns` pass by."""

MOST_COLUMNS = 256
"""No tile has more columns."""

SMALL_TILE = Tile(128, 64, 8, 2, shared_kib=98)
"""For all other GPUs: less than 99 KiB of shared memory for both head sizes."""


@triton.jit
def _rows(source, stride, start, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """`[ROWS, HEAD_DIM]` from row `start` of one head; beyond `length` the last row again."""
    row = tl.minimum(start + tl.arange(0, ROWS), length - 1).to(tl.int64)
    return tl.load(source + row[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :])


@triton.jit
def _passing(
    source, stride, head, start, length,
    COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """`[COLUMNS, HEAD_DIM]` from row `start`; beyond `length` anything finite."""
    if LOAD == "pointers":
        tile = _rows(source, stride, start, length, COLUMNS, HEAD_DIM)
    elif INSIDE:
        tile = source.load([start, head, 0]).reshape(COLUMNS, HEAD_DIM)
    else:
        tile = source.load([head, start, 0]).reshape(COLUMNS, HEAD_DIM)
    return tile


@triton.jit
def _raise_total(total, peak, scores, scale):
    raised = tl.maximum(peak, tl.max(scores, 1) * scale)
    total = total * tl.exp2(peak - raised) + tl.sum(tl.exp2(scores * scale - raised[:, None]), 1)
    return total, raised


@triton.jit(do_not_specialize=["length"])
def row_normalizers_kernel(
    q, k, lse, q_head, q_stride, k_head, k_stride, lse_head, length, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Pass 1. `lse` float32, a head every `lse_head`; `scale` is log2(e) / sqrt(D)."""
    blocks = tl.cdiv(length, ROWS)
    head, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    queries = _rows(q + head.to(tl.int64) * q_head, q_stride, first, length, ROWS, HEAD_DIM)
    if LOAD == "pointers":
        k += head.to(tl.int64) * k_head
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -1e38, tl.float32)
    full = length // COLUMNS
    for block in tl.range(0, full):
        keys = _passing(k, k_stride, head, block * COLUMNS, length, COLUMNS, HEAD_DIM, LOAD, INSIDE)
        total, peak = _raise_total(total, peak, tl.dot(queries, keys.T), scale)
    if full * COLUMNS < length:
        keys = _passing(k, k_stride, head, full * COLUMNS, length, COLUMNS, HEAD_DIM, LOAD, INSIDE)
        there = full * COLUMNS + tl.arange(0, COLUMNS) < length
        scores = tl.where(there[None, :], tl.dot(queries, keys.T), -float("inf"))
        total, peak = _raise_total(total, peak, scores, scale)
    row = first + tl.arange(0, ROWS)
    tl.store(lse + head.to(tl.int64) * lse_head + row, peak + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=["length"])
def key_sums_kernel(
    q, k, lse, sums, q_head, q_stride, k_head, k_stride, lse_head, length, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, LOAD: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """Pass 2. `sums` float32 `[H, L]`. `lse` is infinite beyond the end up to a whole tile: those queries add nothing."""
    blocks = tl.cdiv(length, ROWS)
    head, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    keys = _rows(k + head.to(tl.int64) * k_head, k_stride, first, length, ROWS, HEAD_DIM)
    if LOAD == "pointers":
        q += head.to(tl.int64) * q_head
    lse += head.to(tl.int64) * lse_head
    total = tl.zeros([ROWS], tl.float32)
    for block in tl.range(0, tl.cdiv(length, COLUMNS)):
        normalizers = tl.load(lse + block * COLUMNS + tl.arange(0, COLUMNS))
        queries = _passing(q, q_stride, head, block * COLUMNS, length, COLUMNS, HEAD_DIM, LOAD, INSIDE)
        scores = tl.dot(keys, queries.T)
        total += tl.sum(tl.exp2(scores * scale - normalizers[None, :]), 1)
    row = first + tl.arange(0, ROWS)
    tl.store(sums + head.to(tl.int64) * length + row, total, mask=row < length)


def column_sums_triton(
    q: Tensor, k: Tensor, *, tiles: tuple[Tile, Tile] | None = None, load: Load | None = None
) -> Tensor:
    """See `op.column_sums`, which checks; float64 `[L]`. `tiles` (of the two passes) and `load` stand in for the choice."""
    first, second = tiles or (None, None)
    lse = row_normalizers(q, k, tile=first, load=load)
    return key_sums(q, k, lse, tile=second, load=load).sum(0, dtype=torch.float64)


def row_normalizers(q: Tensor, k: Tensor, *, tile: Tile | None = None, load: Load | None = None) -> Tensor:
    """Pass 1: float32 `[H, L rounded up to MOST_COLUMNS]`, infinite beyond L."""
    heads, length, _ = q.shape
    padded = triton.cdiv(length, MOST_COLUMNS) * MOST_COLUMNS
    lse = torch.full((heads, padded), float("inf"), dtype=torch.float32, device=q.device)
    _launch(row_normalizers_kernel, {"q": q, "k": k, "lse": lse}, "k", tile, load)
    return lse


def key_sums(q: Tensor, k: Tensor, lse: Tensor, *, tile: Tile | None = None, load: Load | None = None) -> Tensor:
    """Pass 2, with what pass 1 gave: float32 `[H, L]`."""
    heads, length, _ = q.shape
    sums = torch.empty(heads, length, dtype=torch.float32, device=q.device)
    _launch(key_sums_kernel, {"q": q, "k": k, "lse": lse, "sums": sums}, "q", tile, load)
    return sums


def _launch(kernel, tensors: dict[str, Tensor], passing: str, tile: Tile | None, load: Load | None) -> None:
    """`passing` names the one of q and k whose rows pass by."""
    q, k, moving = tensors["q"], tensors["k"], tensors[passing]
    heads, length, head_dim = q.shape
    cut = tile or choose_tile(architecture(q.device), head_dim)
    way = load or ("tma" if takes_tma(moving) else "pointers")
    inside = moving.stride(0) < moving.stride(1)
    arguments = dict(tensors)
    if way == "tma":
        rows = moving.transpose(0, 1) if inside else moving
        arguments[passing] = descriptor(rows, 0 if inside else 1, (cut.columns,))
    with launching(q, cut.shared_kib):
        kernel[(heads * triton.cdiv(length, cut.rows),)](
            **arguments, q_head=q.stride(0), q_stride=q.stride(1), k_head=k.stride(0), k_stride=k.stride(1),
            lse_head=tensors["lse"].stride(0), length=length, scale=head_dim**-0.5 * log2(e),
            ROWS=cut.rows, COLUMNS=cut.columns, HEAD_DIM=head_dim, LOAD=way, INSIDE=inside,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip


def choose_tile(found: Architecture, head_dim: int) -> Tile:
    """The default of Hopper, and for other GPUs the one that fits all."""
    return TILES[head_dim] if found.has_wgmma else SMALL_TILE
