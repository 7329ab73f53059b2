"""Low-rank factors of what sparse attention misses: checks, and the choice of an implementation.

| implementation | where | memory beside the result |
|---|---|---|
| `reference` | any device | one tile of rows, or a few heads of a refresh, in float32 |
| `triton`, a refresh alone | CUDA from compute capability 8.0; bf16, fp16; D 16, 32, 64 or 128 | [D, D] a head and part of L |
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.implementation import Implementation, takes_triton
from reelquant.ops.residual_factorization.reference import Factors, factorize_reference, factorize_refresh_reference

__all__ = ["ITERATIONS", "Factors", "factorize", "factorize_refresh"]

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


def factorize_refresh(
    dense: Tensor,
    sparse: Tensor,
    rank: int,
    *,
    before: Factors | None = None,
    iterations: int = ITERATIONS,
    implementation: Implementation = "auto",
) -> tuple[Factors, Factors | None]:
    """Both terms of a refresh: factors of `D = dense - sparse` and, with `before`, of `D - U V^T` of the refresh before.

    Args:
        dense, sparse: [H, L, D] of one floating dtype.
        rank: k, 1 to D.
        before: what the refresh before found of its D, of the same shapes.
        iterations: as for `factorize`.
        implementation: `auto` takes the kernel where it runs.

    Returns: factors, rows in the dtype of `sparse`, directions float32 (float64 for float64); NaN among a head's directions
        where it holds NaN or inf. Deterministic. No gradient.
    Raises: ValueError for other shapes, ranks or dtypes, or `triton` where the kernel does not run.
    """
    if dense.ndim != 3 or dense.shape != sparse.shape or dense.numel() == 0 or not sparse.is_floating_point():
        raise ValueError(
            f"dense and sparse must both be floating [H, L, D], got {dense.dtype} {tuple(dense.shape)} "
            f"and {sparse.dtype} {tuple(sparse.shape)}"
        )
    heads, length, d = dense.shape
    if not 1 <= rank <= d:
        raise ValueError(f"rank is {rank}; 1 to the head size {d}")
    if before is not None and (before.rows.shape, before.directions.shape) != ((heads, length, rank), (heads, d, rank)):
        raise ValueError(
            f"factors of the refresh before must be [{heads}, {length}, {rank}] and [{heads}, {d}, {rank}], "
            f"got {list(before.rows.shape)} and {list(before.directions.shape)}"
        )
    with torch.no_grad():
        if takes_triton(implementation, dense.device, unsuited=_unsuited(dense, sparse)):
            from reelquant.ops.residual_factorization.kernel import launch_factorize_refresh

            return launch_factorize_refresh(dense, sparse, rank, before=before, iterations=iterations)
        return factorize_refresh_reference(dense, sparse, rank, before=before, iterations=iterations)


def _unsuited(dense: Tensor, sparse: Tensor) -> str | None:
    if {dense.dtype, sparse.dtype} not in ({torch.bfloat16}, {torch.float16}):
        return f"attention in {dense.dtype} and {sparse.dtype}; it takes bf16 or fp16"
    if dense.shape[2] not in (16, 32, 64, 128):
        return f"heads of {dense.shape[2]}; it takes 16, 32, 64 and 128"
    if dense.stride(2) != 1 or sparse.stride(2) != 1:
        return "values of a head that do not lie side by side"
    return None
