"""Column sums in plain torch, on any device: what defines the result of every other implementation.

Shapes: H heads, L tokens, D head size. A tile is a run of query rows against all L keys, so one pass has each row's
normalizer at hand; memory is that of one tile beside O(L D) a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.implementation import turns

LARGEST_TILE_ROWS = 1024
"""Bounds a tile for short sequences, which would otherwise fit whole."""


def column_sums_reference(q: Tensor, k: Tensor, *, tile_bytes: int) -> Tensor:
    """See `op.column_sums`; float64 `[L]`, not finite where `q` or `k` is not or their products overflow."""
    num_heads, length, head_dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    row_bytes = length * dtype.itemsize
    tile_rows = max(1, min(length, LARGEST_TILE_ROWS, tile_bytes // row_bytes))
    tile_heads = max(1, min(num_heads, tile_bytes // (row_bytes * tile_rows)))
    tile = torch.empty(tile_heads * tile_rows * length, dtype=dtype, device=q.device)
    sums = torch.zeros(length, dtype=torch.float64, device=q.device)
    for q_heads, k_heads in turns(list(zip(q.split(tile_heads), k.split(tile_heads), strict=True)), q):
        keys = k_heads.to(dtype).transpose(1, 2)
        queries = q_heads.to(dtype) * head_dim**-0.5
        for rows in turns(queries.split(tile_rows, dim=1), q):
            sums += _tile_column_sums(rows, keys, tile)
    return sums


def _tile_column_sums(rows: Tensor, keys: Tensor, tile: Tensor) -> Tensor:
    """[L] sums over `rows` [h, r, D] (already over sqrt(D)) of their softmax against `keys` [h, D, L], in `tile`."""
    num_heads, num_rows, _ = rows.shape
    length = keys.shape[2]
    scores = tile[: num_heads * num_rows * length].view(num_heads, num_rows, length)
    torch.bmm(rows, keys, out=scores)
    scores.sub_(scores.amax(2, keepdim=True)).exp_()
    scores = scores.view(num_heads * num_rows, length)
    return scores.T @ scores.sum(1).reciprocal_()
