"""Spectral norm of `X^T X`, the Hessian of a layer's error (S2Q-VDiT section 3.2, eq. for C_quant), for an input `X` [L, d].

| input | way |
|---|---|
| at most 1024 tokens or features | eigvalsh of the smaller Gram matrix, in float64 |
| 16 bits on CUDA, more tokens than features | Lanczos steps on the Gram matrix `[d, d]` float32, of several inputs together |
| any other | Lanczos steps on products with `X`, in float32 at least |

Lanczos steps (power iteration that keeps its history) begin at a fixed start; their recurrence is in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST_DENSE_GRAM = 1024
"""Up to this size the Gram matrix is formed and solved; above it, Lanczos steps."""
GRAMS_AT_ONCE = 8
"""Of `SpectralNorms`: a step of one is some 25 launches on little data, and so is a step of eight. 288 MiB for d = 3072."""
LANCZOS_STEPS = 128
LANCZOS_TOLERANCE = 1e-4
"""Residual over eigenvalue at which iteration stops; the eigenvalue's own error is of second order in it."""
STEPS_A_LOOK = 8
"""Every how many steps the residual is read: a GPU is waited for then, and not between."""
STEPS_A_LOOK_TOGETHER = 16
"""The same for several matrices, where a look takes the host an eigenvalue problem for each."""
LEAST_BETA = 1e-13
"""Relative to the largest diagonal entry: a new direction below it is rounding."""
CHUNK_ROWS = 4096
SUMMED_ROWS = 1024
"""Rows that the tensor cores sum up; over 5000 they were 2.4e-5 too small on an H100."""


def spectral_norm_gram(x: Tensor) -> Tensor:
    """Largest eigenvalue of `X^T X` for `x` [L, d] floating: float32 scalar, relative error below 1e-5.

    Raises ValueError for other shapes, NaN or inf.
    """
    if x.ndim != 2 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"tokens must be floating [L, d], got {x.dtype} {tuple(x.shape)}")
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ValueError(f"tokens holds {bad} NaN or infinite values of {x.numel()}, shape {tuple(x.shape)}")
    with torch.no_grad():
        if min(x.shape) <= LARGEST_DENSE_GRAM:
            largest: Tensor = torch.linalg.eigvalsh(_smaller_gram(x))[-1].clamp_min(0)
        elif _forms_gram((x,)):
            gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            _add_to_gram(gram, (x,))
            largest = _largest_eigenvalue(_gram_product(gram), gram.shape[:1], x.device)
        else:
            largest = _largest_eigenvalue(_product_with(x), x.shape[1:], x.device)
    return largest.to(x.device).float()


class SpectralNorms:
    """`spectral_norm_gram` of many inputs, in their order. Of an input that is to wait for others its Gram matrix is kept."""

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._grams: Tensor | None = None
        self._num_grams = 0

    def add(self, *parts: Tensor) -> None:
        """Takes an input whose rows are those of `parts` [n, d], floating, n at least 0, one after the other.

        Raises: ValueError for other shapes; for NaN or inf at once, or where Gram matrices are kept when they are worked on.
        """
        width = parts[0].shape[-1]
        if any(part.ndim != 2 or part.shape[1] != width or not part.is_floating_point() for part in parts):
            given = [(part.dtype, tuple(part.shape)) for part in parts]
            raise ValueError(f"parts of an input must all be floating [n, d], got {given}")
        with torch.no_grad():
            if not _forms_gram(parts):
                self._solve()
                self._norms.append(spectral_norm_gram(torch.cat(parts)).cpu())
                return
            if self._grams is None or self._grams.shape[1] != width:
                self._solve()
                self._grams = torch.empty(GRAMS_AT_ONCE, width, width, device=parts[0].device)
            _add_to_gram(self._grams[self._num_grams].zero_(), parts)
            self._num_grams += 1
            if self._num_grams == GRAMS_AT_ONCE:
                self._solve()

    def take(self) -> Tensor:
        """float32 `[inputs]` on the CPU, of all inputs since the last call; nothing is held any more."""
        with torch.no_grad():
            self._solve()
        norms, self._norms, self._grams = self._norms, [], None
        return torch.stack(norms)

    def _solve(self) -> None:
        if self._grams is None or not self._num_grams:
            return
        grams, self._num_grams = self._grams[: self._num_grams], 0
        # A diagonal entry is a column's sum of squares: no NaN or inf of the input is lost in it.
        finite = grams.diagonal(dim1=1, dim2=2).isfinite().all(1).tolist()
        if broken := [len(self._norms) + place for place, whole in enumerate(finite) if not whole]:
            raise ValueError(
                f"tokens of the inputs {broken}, counted from 0, hold NaN or infinite values, or some so large that "
                "their squares overflow float32"
            )
        self._norms += _largest_eigenvalue(_gram_product(grams), grams.shape[:2], grams.device).float().unbind()


def _forms_gram(parts: tuple[Tensor, ...]) -> bool:
    """Whether the tensor cores read an input, whose rows lie in `parts`, once."""
    num_tokens, d = sum(map(len, parts)), parts[0].shape[1]
    on_tensor_cores = all(part.is_cuda and part.dtype in (torch.bfloat16, torch.float16) for part in parts)
    return on_tensor_cores and num_tokens >= d > LARGEST_DENSE_GRAM


def _add_to_gram(gram: Tensor, parts: tuple[Tensor, ...]) -> None:
    """Adds `X^T X` to `gram` [d, d] float32. Tensor cores multiply 16-bit numbers exactly, but their float32 sums are cut off,
    not rounded: long sums come out too small, hence chunks, which are added with rounding."""
    for part in parts:
        for chunk in part.split(SUMMED_ROWS):
            torch.addmm(gram, chunk.T, chunk, out_dtype=torch.float32, out=gram)


def _smaller_gram(x: Tensor) -> Tensor:
    """float64 Gram matrix over the shorter axis, summed over chunks of the longer one."""
    rows = x if x.shape[0] >= x.shape[1] else x.T
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=x.device)
    for chunk in rows.split(CHUNK_ROWS):
        wide = chunk.double()
        gram.addmm_(wide.T, wide)
    return gram


def _largest_eigenvalue(gram_times: Callable[[Tensor], Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Lanczos with full reorthogonalization in float64; what decides when to stop is read every few steps only.

    Args:
        gram_times: `v -> X^T X v` for `v` float64 of `shape`, a new tensor of that kind.
        shape: `(d,)`, or `(B, d)` for B matrices together, of which all take as many steps as the slowest.

    Returns: float64 `shape[:-1]`, on the CPU.
    """
    *batch, d = shape
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(d, generator=generator, dtype=torch.float64).to(device)
    num_steps = min(LANCZOS_STEPS, d)
    steps_a_look = STEPS_A_LOOK_TOGETHER if batch else STEPS_A_LOOK
    basis = torch.zeros(*batch, num_steps + 1, d, dtype=torch.float64, device=device)
    basis[..., 0, :] = start / start.norm()
    tridiagonals = torch.zeros(2, *batch, num_steps, dtype=torch.float64, device=device)
    alphas, betas = tridiagonals
    largest = torch.zeros(batch, dtype=torch.float64)
    for step in range(num_steps):
        product = gram_times(basis[..., step, :])
        alphas[..., step] = torch.linalg.vecdot(basis[..., step, :], product)
        known = basis[..., : step + 1, :]
        for _ in range(2):
            product -= _times(known.mT, _times(known, product))
        beta = torch.linalg.vector_norm(product, dim=-1)
        # Where the history spans an invariant subspace what is left is rounding: a zero vector ends it.
        beta = torch.where(beta > LEAST_BETA * alphas[..., : step + 1].amax(-1), beta, 0.0)
        betas[..., step] = beta
        basis[..., step + 1, :] = torch.where(beta[..., None] > 0, product / beta[..., None], 0.0)
        done = step + 1
        if done % steps_a_look == 0 or done == num_steps:
            diagonal, beside = tridiagonals[..., :done].cpu()
            tridiagonal = diagonal.diag_embed() + beside[..., :-1].diag_embed(1) + beside[..., :-1].diag_embed(-1)
            values, vectors = torch.linalg.eigh(tridiagonal)
            largest = values[..., -1]
            residual = beside[..., -1] * vectors[..., -1, -1].abs()
            if bool((residual <= LANCZOS_TOLERANCE * largest).all()):
                break
    return largest


def _gram_product(gram: Tensor) -> Callable[[Tensor], Tensor]:
    """`v -> X^T X v` in float64, by one Gram matrix or several, in float32 inside."""
    return lambda vector: _times(gram, vector.to(gram.dtype)).double()


def _product_with(x: Tensor) -> Callable[[Tensor], Tensor]:
    """`v -> X^T X v` in float64, for `v` [d]; the Gram matrix is not formed."""
    dtype = torch.promote_types(x.dtype, torch.float32)

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for chunk in x.split(CHUNK_ROWS):
            rows = chunk.to(dtype)
            total += rows.T @ (rows @ vector.to(dtype))
        return total

    return product


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector: one of each, or a batch of both."""
    product: Tensor = matrix @ vector if vector.ndim == 1 else (matrix @ vector[..., None])[..., 0]
    return product
