"""Low-rank factors of a residual: checks, and the choice of an implementation.

| implementation | where | memory |
|---|---|---|
| `reference` | any device | the result and one tile of rows |

A hand-written kernel becomes another row; callers do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.residual_factorization.reference import factorize_reference

ITERATIONS = 12
"""With these, the energy of an SVD but for 3e-5, on spectra from noise to `0.7^i`; the projection itself to 2e-6 on noise
(the test has both)."""


def factorize(residual: Tensor, rank: int, *, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """`U V^T`, the projection of every head's [L, D] on its top `rank` right singular directions (QuantSparse §3.3, `P_k`).

    Args:
        residual: [H, L, D] floating, finite; L may be below D.
        rank: k, 1 to D.
        iterations: of the first part of `reference`, at least 1; a fixed number, so that nothing waits for the device.

    Returns: U [H, L, k] and V [H, D, k], float32 (float64 for float64). V's columns are orthonormal and in no order,
        `U = residual @ V`. NaN where a head holds NaN or inf. Deterministic. No gradient.
    Raises: ValueError for other shapes, ranks or iterations.
    """
    if residual.ndim != 3 or residual.numel() == 0 or not residual.is_floating_point():
        raise ValueError(f"residual must be floating [H, L, D], got {residual.dtype} {tuple(residual.shape)}")
    if not 1 <= rank <= residual.shape[2]:
        raise ValueError(f"rank is {rank}; 1 to the head size {residual.shape[2]}")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1")
    with torch.no_grad():
        return factorize_reference(residual, rank, iterations=iterations)
