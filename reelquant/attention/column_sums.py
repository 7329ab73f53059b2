"""What every token receives of the attention, without the attention matrix (S2Q-VDiT section 3.3, `S_j`)."""

from __future__ import annotations

from torch import Tensor

from reelquant.ops.column_sums.op import TILE_BYTES, column_sums

__all__ = ["TILE_BYTES", "attention_column_sums"]


def attention_column_sums(q: Tensor, k: Tensor, *, tile_bytes: int = TILE_BYTES) -> Tensor:
    """`S_j = sum over heads and queries of softmax(q k^T / sqrt(D))[h, i, j]`; the sum over j is H times L.

    Args:
        q, k: [H, L, D] floating, after normalization and rotary embedding; products in float32 (float64 for float64).
        tile_bytes: size of the one score tile held at a time where no kernel runs, > 0; at least one row is held.

    Returns: float32 [L]. No gradient.
    Raises: ValueError for other shapes, NaN or inf in `q` or `k`.
    """
    return column_sums(q, k, tile_bytes=tile_bytes)
