"""Which (prompt, timestep) candidates are worth calibrating on (salient data selection, S2Q-VDiT section 3.2).

A candidate's score is the product of two saliences, each min-max normalized over the pool: how much denoising changes
the latent there (`diffusion_salience`), and how much a weight error there costs (`quantization_salience`, or on block
inputs `spectral_norm_gram`, or with the real weight error `weight_error`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

LARGEST_DENSE_GRAM = 1024
"""Up to this size the Gram matrix is formed and solved; above it, Lanczos steps."""
LANCZOS_STEPS = 128
LANCZOS_TOLERANCE = 1e-4
"""Residual over eigenvalue at which iteration stops; the eigenvalue's own error is of second order in it."""
STEPS_A_LOOK = 8
"""Every how many steps the residual is read: a GPU is waited for then, and not between."""
LEAST_BETA = 1e-13
"""Relative to the largest diagonal entry: a new direction below it is rounding."""
CHUNK_ROWS = 4096
SUMMED_ROWS = 1024
"""Rows that the tensor cores sum up; over 5000 they were 2.4e-5 too small on an H100."""


def diffusion_salience(latents: Tensor) -> Tensor:
    """`||x_t - x_{t-1}||² / ||x_t||²` for t = 1..T (S2Q-VDiT eq. for C_diff).

    Args: `latents` [T + 1, ...] floating, `latents[t]` = x_t.
    Returns: float32 [T]; entry t - 1 belongs to x_t. Two equal latents give 0, zero ones too.
    Raises: ValueError for fewer than two latents, NaN or inf, or a change to an all-zero latent.
    """
    if latents.ndim < 2 or latents.shape[0] < 2:
        raise ValueError(f"latents must be [T + 1, ...] with T at least 1, got {tuple(latents.shape)}")
    _check_finite("latents", latents)
    rows = latents.detach().flatten(1)
    changes, energies = [], []
    for before, after in pairwise(rows):
        wide = after.double()
        changes.append((wide - before.double()).square_().sum())
        energies.append(wide.square_().sum())
    change, energy = torch.stack(changes), torch.stack(energies)
    zero = (energy == 0) & (change > 0)
    if bool(zero.any()):
        raise ValueError(f"latents[{int(zero.nonzero()[0]) + 1}] is zero throughout: its relative change is infinite")
    return (change / torch.where(energy == 0, 1.0, energy)).float()


def quantization_salience(tokens: Tensor) -> Tensor:
    """Spectral norm of `X^T X`, the Hessian of the layer error (S2Q-VDiT eq. for C_quant).

    `tokens` [L, d] floating; returns a float32 scalar. Errors as `spectral_norm_gram`.
    """
    return spectral_norm_gram(tokens)


def spectral_norm_gram(x: Tensor) -> Tensor:
    """Largest eigenvalue of `X^T X` for `x` [L, d] floating: float32 scalar, relative error below 1e-5.

    With at most 1024 tokens or features: eigvalsh of the smaller Gram matrix, in float64. Otherwise Lanczos steps
    (power iteration that keeps its history) from a fixed start, on products with `x` or, for 16 bits on CUDA, with the Gram
    matrix (`d^2` float64). Raises ValueError for other shapes, NaN or inf.
    """
    if x.ndim != 2 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"tokens must be floating [L, d], got {x.dtype} {tuple(x.shape)}")
    _check_finite("tokens", x)
    with torch.no_grad():
        num_tokens, d = x.shape
        if min(num_tokens, d) <= LARGEST_DENSE_GRAM:
            largest: Tensor = torch.linalg.eigvalsh(_smaller_gram(x))[-1].clamp_min(0)
        else:
            largest = _largest_eigenvalue(x)
    return largest.float()


def minmax(x: Tensor) -> Tensor:
    """`(x - min) / (max - min)` over all elements: float32, shape of `x`; all ones where `x` is constant.

    Raises ValueError for an empty tensor, NaN or inf.
    """
    return _minmax("x", x).float()


def select_salient(c_diff: Tensor, c_quant: Tensor, num: int) -> Tensor:
    """The `num` candidates of largest `minmax(c_diff) * minmax(c_quant)` (S2Q-VDiT section 3.2).

    Args: `c_diff` and `c_quant` [M], the saliences of the whole pool; `num` 1..M.
    Returns: int64 [num], best first; among equals the earlier candidate.
    Raises: ValueError for other shapes, `num` outside 1..M, NaN or inf.
    """
    if c_diff.ndim != 1 or c_diff.shape != c_quant.shape:
        raise ValueError(f"c_diff and c_quant must both be [M], got {tuple(c_diff.shape)} and {tuple(c_quant.shape)}")
    if not 1 <= num <= c_diff.shape[0]:
        raise ValueError(
            f"cannot select {num} of {c_diff.shape[0]} candidates: ask for 1 to {c_diff.shape[0]}, "
            "or enlarge the pool (more prompts or more steps)"
        )
    score = _minmax("c_diff", c_diff) * _minmax("c_quant", c_quant)
    return torch.argsort(score, descending=True, stable=True)[:num]


def weight_error(x: Tensor, weight: Tensor, quantized_weight: Tensor) -> Tensor:
    """`||X D^T||² / ||X W^T||²` with `D = quantized_weight - weight`: relative output error of one layer, by weights.

    Args: `x` [n, d]; `weight` and `quantized_weight` [out, d]; floating.
    Returns: float32 scalar. Raises: ValueError for other shapes, NaN or inf, or an output that is zero throughout.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or weight.shape != quantized_weight.shape:
        raise ValueError(
            "x must be [n, d], weight and quantized_weight [out, d], got "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(quantized_weight.shape)}"
        )
    with torch.no_grad():
        wide = weight.float()
        delta = quantized_weight.float() - wide
        totals = torch.zeros(2, dtype=torch.float64, device=x.device)
        for chunk in x.split(CHUNK_ROWS):
            rows = chunk.float()
            totals[0] += (rows @ delta.T).square_().sum(dtype=torch.float64)
            totals[1] += (rows @ wide.T).square_().sum(dtype=torch.float64)
        noise, signal = totals.tolist()
    if not (noise < float("inf") and signal < float("inf")):
        for name, tensor in (("x", x), ("weight", weight), ("quantized_weight", quantized_weight)):
            _check_finite(name, tensor)
        raise ValueError("the layer's output overflows float32: scale x or weight down")
    if signal == 0.0:
        raise ValueError("x @ weight^T is zero throughout: there is no output to compare the error with")
    return (totals[0] / totals[1]).float()


def _minmax(name: str, x: Tensor) -> Tensor:
    if x.numel() == 0:
        raise ValueError(f"{name} is empty")
    _check_finite(name, x)
    wide = x.detach().double()
    low, high = wide.aminmax()
    spread = high - low
    return torch.where(spread > 0, (wide - low) / torch.where(spread > 0, spread, 1.0), 1.0)


def _smaller_gram(x: Tensor) -> Tensor:
    """float64 Gram matrix over the shorter axis, summed over chunks of the longer one."""
    rows = x if x.shape[0] >= x.shape[1] else x.T
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=x.device)
    for chunk in rows.split(CHUNK_ROWS):
        wide = chunk.double()
        gram.addmm_(wide.T, wide)
    return gram


def _largest_eigenvalue(x: Tensor) -> Tensor:
    """Lanczos with full reorthogonalization on `X^T X` in float64; what decides when to stop is read every few steps only."""
    gram_times = _gram_product(x)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(x.shape[1], generator=generator, dtype=torch.float64).to(x.device)
    num_steps = min(LANCZOS_STEPS, x.shape[1])
    basis = torch.zeros(num_steps + 1, x.shape[1], dtype=torch.float64, device=x.device)
    basis[0] = start / start.norm()
    alphas, betas = torch.zeros(2, num_steps, dtype=torch.float64, device=x.device)
    largest = torch.zeros((), dtype=torch.float64)
    for step in range(num_steps):
        product = gram_times(basis[step])
        alphas[step] = basis[step] @ product
        known = basis[: step + 1]
        for _ in range(2):
            product -= known.T @ (known @ product)
        beta = product.norm()
        # Where the history spans an invariant subspace what is left is rounding: a zero vector ends it.
        beta = torch.where(beta > LEAST_BETA * alphas[: step + 1].max(), beta, 0.0)
        betas[step] = beta
        basis[step + 1] = torch.where(beta > 0, product / beta, 0.0)
        done = step + 1
        if done % STEPS_A_LOOK == 0 or done == num_steps:
            diagonal, beside = alphas[:done].cpu(), betas[:done].cpu()
            tridiagonal = diagonal.diag() + beside[:-1].diag(1) + beside[:-1].diag(-1)
            values, vectors = torch.linalg.eigh(tridiagonal)
            largest = values[-1]
            if float(beside[-1] * vectors[-1, -1].abs()) <= LANCZOS_TOLERANCE * float(largest):
                break
    return largest.to(x.device)


def _gram_product(x: Tensor) -> Callable[[Tensor], Tensor]:
    """`v -> X^T X v` in float64, for `v` [d].

    On CUDA a 16-bit `x` with more tokens than features is read once, by the tensor cores. Their products of 16-bit numbers
    are exact, but their float32 sums are cut off, not rounded: long sums come out too small, hence chunks. Elsewhere the Gram
    matrix is not formed: products with `x`, in float32 at least.
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] >= x.shape[1]:
        gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        for chunk in x.split(SUMMED_ROWS):
            gram += torch.mm(chunk.T, chunk, out_dtype=torch.float32)
        gram = gram.double()
        return lambda vector: gram @ vector
    dtype = torch.promote_types(x.dtype, torch.float32)

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for chunk in x.split(CHUNK_ROWS):
            rows = chunk.to(dtype)
            total += rows.T @ (rows @ vector.to(dtype))
        return total

    return product


def _check_finite(name: str, x: Tensor) -> None:
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} NaN or infinite values of {x.numel()}, shape {tuple(x.shape)}")
