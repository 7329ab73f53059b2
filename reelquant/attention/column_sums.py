"""What every token receives of the attention, without the attention matrix (S2Q-VDiT section 3.3, `S_j`).

Shapes: H heads, L tokens, D head size. A tile is a run of query rows against all L keys, so one pass has each row's
normalizer at hand; memory is that of one tile beside O(L D) a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_BYTES = 64 * 2**20
LARGEST_TILE_ROWS = 1024
"""Bounds a tile for short sequences, which would otherwise fit whole."""


def attention_column_sums(q: Tensor, k: Tensor, *, tile_bytes: int = TILE_BYTES) -> Tensor:
    """`S_j = sum over heads and queries of softmax(q k^T / sqrt(D))[h, i, j]`; the sum over j is H times L.

    Args:
        q, k: [H, L, D] floating, after normalization and rotary embedding; products in float32 (float64 for float64).
        tile_bytes: size of the one score tile held at a time, > 0; at least one row of scores is held.

    Returns: float32 [L]. No gradient.
    Raises: ValueError for other shapes, NaN or inf in `q` or `k`.
    """
    if q.ndim != 3 or q.shape != k.shape or q.numel() == 0 or not q.is_floating_point():
        raise ValueError(f"q and k must both be floating [H, L, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if tile_bytes < 1:
        raise ValueError(f"tile_bytes must be positive, got {tile_bytes}")
    num_heads, length, head_dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    row_bytes = length * dtype.itemsize
    tile_rows = max(1, min(length, LARGEST_TILE_ROWS, tile_bytes // row_bytes))
    tile_heads = max(1, min(num_heads, tile_bytes // (row_bytes * tile_rows)))
    with torch.no_grad():
        tile = torch.empty(tile_heads * tile_rows * length, dtype=dtype, device=q.device)
        sums = torch.zeros(length, dtype=torch.float64, device=q.device)
        for q_heads, k_heads in zip(q.split(tile_heads), k.split(tile_heads), strict=True):
            keys = k_heads.to(dtype).transpose(1, 2)
            queries = q_heads.to(dtype) * head_dim**-0.5
            for rows in queries.split(tile_rows, dim=1):
                sums += _tile_column_sums(rows, keys, tile)
    if not bool(sums.isfinite().all()):
        for name, tensor in (("q", q), ("k", k)):
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise ValueError(f"{name} holds {bad} NaN or infinite values of {tensor.numel()}")
        raise ValueError("the products of q and k overflow float32: pass float64, or check the scale of q and k")
    return sums.float()


def _tile_column_sums(rows: Tensor, keys: Tensor, tile: Tensor) -> Tensor:
    """[L] sums over `rows` [h, r, D] (already over sqrt(D)) of their softmax against `keys` [h, D, L], in `tile`."""
    num_heads, num_rows, _ = rows.shape
    length = keys.shape[2]
    scores = tile[: num_heads * num_rows * length].view(num_heads, num_rows, length)
    torch.bmm(rows, keys, out=scores)
    scores.sub_(scores.amax(2, keepdim=True)).exp_()
    scores = scores.view(num_heads * num_rows, length)
    return scores.T @ scores.sum(1).reciprocal_()
