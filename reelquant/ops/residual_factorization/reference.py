"""Low-rank factors of a residual in plain torch, on any device: what defines the result of every other implementation.

Shapes: H heads, L tokens, D head size, k rank.

The top right singular directions V of M are the top eigenvectors of `G = M^T M`, which is only [D, D]; they are found in two
parts, without a library's QR, SVD or eigenvalues, which are slow for batches on GPUs.

1. Subspace iteration, `V <- orth(P V)`, with `P = G / trace G + SHIFT I` at first and then, every few iterations, its
   square, normalized and shifted anew: the first powers tell the large eigenvalues from the small, the later ones large
   ones from each other. This alone loses 5 % of the energy that an SVD captures of noise, and up to 1 % elsewhere.
2. `V <- orth(F V)` with F = `_step`: P with all eigenvalues above a threshold moved to one value and all below to another, by
   the Newton-Schulz iteration of the matrix sign. This tells the k-th eigenvalue from the next where they
   differ by more than about 1e-5 of the largest; closer ones hardly matter to the energy.

The shift leaves the eigenvectors as they are and bounds the condition of what is orthonormalized by `1 / SHIFT`, whatever
the rank of M, zero included; squared, as Cholesky's factorization sees it, that is still far from float64's precision. So
the small matrices are float64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from reelquant.ops.architecture import current_stream

TILE_ROWS = 8192
TILE_BYTES = 128 * 2**20
"""Heads of a refresh are worked on in groups of about this many bytes of float32, at least one head."""
SHIFT = 1e-6
"""Share of the trace: directions that carry less than this of the energy are not told apart."""
ITERATIONS_PER_POWER = 3
SEPARATIONS = 3
"""Steps of part 2; the first finds the threshold only roughly."""
SIGN_STEPS = 24
"""Each takes what is near the threshold 1.5 times further from it: 1e-4 of the largest eigenvalue becomes 1."""
SQUARINGS = 12


class Factors(NamedTuple):
    """A residual of every head as `rows @ directions^T`."""

    rows: Tensor
    """[H, L, k]."""
    directions: Tensor
    """[H, D, k], orthonormal columns; float32 or wider: it is small."""


def factorize_refresh_reference(
    dense: Tensor, sparse: Tensor, rank: int, *, before: Factors | None, iterations: int
) -> tuple[Factors, Factors | None]:
    """See `op.factorize_refresh`; a few heads at a time, differences in float32 or wider."""
    residuals, changes = [], []
    wide = torch.promote_types(sparse.dtype, torch.float32)
    for heads in head_groups(sparse):
        residual = dense[heads].to(wide) - sparse[heads].to(wide)
        if before is None:
            residuals.append(factorize_reference(residual, rank, iterations=iterations))
            continue
        rows, directions = (x[heads].to(wide) for x in before)
        both = torch.cat([residual, torch.baddbmm(residual, rows, directions.mT, alpha=-1.0)])
        rows, directions = factorize_reference(both, rank, iterations=iterations)
        num = len(residual)
        residuals.append((rows[:num], directions[:num]))
        changes.append((rows[num:], directions[num:]))
    return _joined(residuals, sparse.dtype), _joined(changes, sparse.dtype) if changes else None


def head_groups(x: Tensor) -> list[slice]:
    """Slices of the heads of [H, L, D], each about TILE_BYTES of float32."""
    heads, tokens, d = x.shape
    size = max(1, TILE_BYTES // (4 * tokens * d))
    return [slice(start, min(heads, start + size)) for start in range(0, heads, size)]


def _joined(parts: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Factors:
    return Factors(torch.cat([rows.to(dtype) for rows, _ in parts]), torch.cat([directions for _, directions in parts]))


def factorize_reference(residual: Tensor, rank: int, *, iterations: int) -> tuple[Tensor, Tensor]:
    """See `op.factorize`. Beside `residual` and the result it holds one tile of rows in float32 and [H, D, D]."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    directions = top_directions(_gram(residual, wide), rank, iterations).to(wide)
    rows = torch.empty(*residual.shape[:2], rank, dtype=wide, device=residual.device)
    for tile, out in zip(residual.split(TILE_ROWS, dim=1), rows.split(TILE_ROWS, dim=1), strict=True):
        out.copy_(tile.to(wide) @ directions)
    return rows, directions


def _gram(residual: Tensor, wide: torch.dtype) -> Tensor:
    """float64 [H, D, D]: `M^T M` of every head, M over its largest magnitude; products in `wide`."""
    heads, _, d = residual.shape
    low, high = residual.flatten(1).aminmax(dim=1)
    largest = torch.maximum(high, -low).to(wide).view(heads, 1, 1)
    largest = torch.where(largest == 0, 1.0, largest)
    gram = torch.zeros(heads, d, d, dtype=torch.float64, device=residual.device)
    for tile in residual.split(TILE_ROWS, dim=1):
        rows = tile.to(wide) / largest
        gram += rows.transpose(1, 2) @ rows
    return gram


def top_directions(gram: Tensor, rank: int, iterations: int) -> Tensor:
    """Orthonormal columns [H, D, k] that span the top eigenvectors of `gram`, in no order."""
    heads, d, _ = gram.shape
    directions = _orthonormal(
        _orthonormal(_start(d, rank, gram.device, current_stream(gram.device)).expand(heads, -1, -1))
    )
    shifted = power = _shifted(gram)
    for iteration in range(iterations):
        if iteration and iteration % ITERATIONS_PER_POWER == 0:
            power = _shifted(power @ power)
        directions = _orthonormal(power @ directions)
    directions = _orthonormal(directions)
    largest = _largest(shifted)
    for _ in range(SEPARATIONS if rank < d else 0):
        directions = _orthonormal(_orthonormal(_step(shifted, largest, directions) @ directions))
    return directions


@lru_cache(maxsize=64)
def _start(d: int, rank: int, device: torch.device, _stream: int) -> Tensor:
    """float64 [D, k]: random, the same everywhere. Kept, because a copy to a GPU waits for all that the GPU has to do."""
    return torch.randn(d, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)


def _step(shifted: Tensor, largest: Tensor, directions: Tensor) -> Tensor:
    """[H, D, D]: `shifted` with its eigenvalues above a threshold moved to 1 and those below to SHIFT; all near it, between.

    The threshold lies in the middle of the least that `directions` hold and the most that they leave out, which is the
    middle of the k-th and the next eigenvalue wherever `directions` mix only these two.
    """
    eye = torch.eye(shifted.shape[1], dtype=shifted.dtype, device=shifted.device)
    factor, _ = torch.linalg.cholesky_ex(directions.mT @ shifted @ directions)
    inverse = torch.linalg.solve_triangular(factor, eye[: factor.shape[1], : factor.shape[1]], upper=False)
    outside = eye - directions @ directions.mT
    threshold = (1 / _largest(inverse.mT @ inverse) + _largest(outside @ shifted @ outside)) / 2
    sign = (shifted - threshold * eye) / torch.maximum(largest - threshold, threshold)
    for _ in range(SIGN_STEPS):
        sign = torch.baddbmm(sign, sign, sign @ sign, beta=1.5, alpha=-0.5)
    return (eye + sign) / 2 + SHIFT * eye


def _largest(matrix: Tensor) -> Tensor:
    """[H, 1, 1] largest eigenvalue of symmetric positive definite matrices, by squaring; never above it."""
    power = matrix
    for _ in range(SQUARINGS):
        power = power / _trace(power)
        power = power @ power
    return (matrix * power).sum(dim=(1, 2), keepdim=True) / _trace(power)


def _trace(matrix: Tensor) -> Tensor:
    """[H, 1, 1]."""
    return matrix.diagonal(dim1=1, dim2=2).sum(dim=1).view(-1, 1, 1)


def _shifted(matrix: Tensor) -> Tensor:
    """`matrix / trace + SHIFT I` of every head; SHIFT I where it is zero."""
    trace = _trace(matrix)
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    shifted: Tensor = matrix / torch.where(trace == 0, 1.0, trace) + SHIFT * eye
    return shifted


def _orthonormal(columns: Tensor) -> Tensor:
    """Cholesky QR of [H, D, k]: error of orthogonality about 1e-16 times the squared condition; a second call mends it."""
    factor, _ = torch.linalg.cholesky_ex(columns.transpose(1, 2) @ columns)
    orthonormal: Tensor = torch.linalg.solve_triangular(factor.transpose(1, 2), columns, upper=True, left=False)
    return orthonormal
