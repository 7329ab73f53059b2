"""Column sums of attention maps: checks, and the choice of an implementation.

| implementation | where | memory |
|---|---|---|
| `reference` | any device | one tile of scores and one head's q and k, in float32 or wider |
| `triton` | CUDA from compute capability 8.0 on, bf16 and fp16, head size 64 or 128 | two `[H, L]` float32 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.column_sums.reference import column_sums_reference
from reelquant.ops.implementation import Implementation, takes_triton

TILE_BYTES = 64 * 2**20
"""Of the one score tile that the reference holds."""


def column_sums(
    q: Tensor, k: Tensor, *, tile_bytes: int = TILE_BYTES, implementation: Implementation = "auto"
) -> Tensor:
    """`S_j = sum over heads and queries of softmax(q k^T / sqrt(D))[h, i, j]`; the sum over j is H times L.

    Args:
        q, k: [H, L, D] floating, after normalization and rotary embedding; products in float32 (float64 for float64).
        tile_bytes: size of the one score tile that `reference` holds at a time, > 0; at least one row of scores is held.
        implementation: `auto` takes `triton` where it can.

    Returns: float32 [L]. No gradient. Deterministic.
    Raises: ValueError for other shapes, NaN or inf in `q` or `k`, or `triton` where it cannot run.
    """
    if q.ndim != 3 or q.shape != k.shape or q.numel() == 0 or not q.is_floating_point():
        raise ValueError(f"q and k must both be floating [H, L, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if tile_bytes < 1:
        raise ValueError(f"tile_bytes must be positive, got {tile_bytes}")
    with torch.no_grad():
        if takes_triton(implementation, q.device, unsuited=_unsuited(q, k), on_meta=True):
            if q.is_meta:
                return q.new_empty(q.shape[1], dtype=torch.float32)
            from reelquant.ops.column_sums.kernel import column_sums_triton

            sums = column_sums_triton(q, k)
        else:
            sums = column_sums_reference(q, k, tile_bytes=tile_bytes)
    if not bool(sums.isfinite().all()):
        for name, tensor in (("q", q), ("k", k)):
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise ValueError(f"{name} holds {bad} NaN or infinite values of {tensor.numel()}")
        raise ValueError("the products of q and k overflow float32: pass float64, or check the scale of q and k")
    return sums.float()


def _unsuited(q: Tensor, k: Tensor) -> str | None:
    """What about `q` and `k` the Triton kernel does not take."""
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype:
        return f"q and k are {q.dtype} and {k.dtype}, not both bfloat16 or both float16"
    if q.shape[2] not in (64, 128):
        return f"the head size is {q.shape[2]}, not 64 or 128"
    if q.stride(2) != 1 or k.stride(2) != 1:
        return "the last dimension of q or k is not contiguous"
    return None
