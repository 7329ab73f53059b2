"""Rounding that lets later columns make up for the error of earlier ones, and the asymmetric target in front of it.

GPTQ (arXiv 2210.17323) minimizes `tr(E H E^T)`, `E` the weight error and `H = sum_j w_j x_j x_j^T` over calibration
tokens `x_j` with token weights `w_j`. Which tokens make up `H` is the caller's: plain tensors in, plain tensors out.

Asymmetric solve (GPTAQ, arXiv 2504.02692, in closed form): the layer reads the quantized stream `X_q` but should give
what the full-precision stream gave. With `C = sum_j w_j x_fp_j x_q_j^T` and L the diagonal matrix of the damping,

    || W X_fp - W' X_q ||² + || (W - W') L^1/2 ||²  =  const + tr((W' - W*) (H + L) (W' - W*)^T),
    W* = (W C + W L) (H + L)^-1

so rounding `W*` by plain GPTQ with `H` and the same damping is the asymmetric solve.

Damping: input j gets `L_jj = damping * max(H_jj, m)`, m the mean of `diag H` without its largest tenth. Textbook GPTQ
takes the mean of all of it, in which one input of 10^8 times the energy leaves all others without feedback. Without m,
quiet inputs would take over more of the loud ones' errors than their grid holds (measured, 192 inputs of log-normal
amplitude, sigma 2, 4 bits: 0.56 of the error of nearest rounding, the mean 0.27, this rule 0.18).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.implementation import turns
from reelquant.quantization.quantizer import max_code
from reelquant.quantization.weight_grid import WeightGrid

LARGEST_FLOAT64_FEATURES = 4096
"""Above it factors are float32: a float64 Hessian of 15,360 inputs and its factor would take 6 GB."""
TYPICAL_SHARE = 0.9
"""Share of the inputs, the quieter ones, whose mean energy is the least that the damping counts with."""


def gptq_round(
    weight: Tensor, hessian: Tensor, grid: WeightGrid, *, block_columns: int = 128, damping: float = 0.01
) -> Tensor:
    """Codes of `weight` on `grid` that keep `tr(E H E^T)` small; the nearest codes where `hessian` is diagonal.

    Columns are taken in the order of falling diagonal of H (the grid is fixed beforehand, so order costs nothing).

    Args:
        weight: [out, in] floating.
        hessian: [in, in], symmetric and positive semidefinite; may be rank-deficient or have dead inputs (zero rows),
            whose weights are rounded to nearest. Its scale does not matter.
        grid: the grid of these weights.
        block_columns: columns worked on before the rest of the matrix is updated; speed only.
        damping: share of the diagonal added to it, >= 0; see the module.

    Returns: int8 [out, in], within +-max_code(grid.bits).
    Raises: ValueError for other shapes, NaN or inf (naming the tensor), or a Hessian that damping leaves indefinite.
    """
    if block_columns < 1:
        raise ValueError(f"block_columns must be at least 1, got {block_columns}")
    _check(weight, damping, hessian=hessian)
    in_features = weight.shape[1]
    with torch.no_grad():
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        factor = _upper_factor_of_inverse(hessian[order][:, order], damping)
        # Transposed, so that the column under work is contiguous.
        rest = weight.T[order].to(factor.dtype)
        scale = grid.column_scale(in_features).T[order]
        codes = torch.empty(scale.shape, dtype=torch.int8, device=weight.device)
        for start in turns(range(0, in_features, block_columns), weight):
            stop = min(start + block_columns, in_features)
            block = slice(start, stop)
            codes[block], error = _round_block(rest[block], factor[block, block], scale[block], max_code(grid.bits))
            if stop < in_features:
                rest[stop:].addmm_(factor[block, stop:].T, error, alpha=-1)
        result = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        result[:, order] = codes.T
    return result


def _round_block(rest: Tensor, factor: Tensor, scale: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Rounds the columns of one block, `rest` [columns, out]; returns int8 codes and the errors over the pivots."""
    codes = torch.empty(rest.shape, dtype=torch.int8, device=rest.device)
    error = torch.empty_like(rest)
    lower = factor.T.contiguous()
    for i, pivot in turns(list(enumerate(factor.diagonal().tolist())), factor):
        column = torch.addmv(rest[i], error[:i].T, lower[i, :i], alpha=-1) if i else rest[i]
        # The division of WeightGrid.round, in its float32: without a correction the codes are the nearest ones exactly.
        code = (column.float() / scale[i]).round_().clamp_(-largest, largest)
        codes[i] = code
        error[i] = (column - code.to(column.dtype) * scale[i]) / pivot
    return codes, error


def asymmetric_target(weight: Tensor, cross: Tensor, hessian: Tensor, *, damping: float = 0.01) -> Tensor:
    """`W*` of the module's docstring: what to round so that the layer undoes the drift of its quantized input.

    Args:
        weight: [out, in] floating, the full-precision layer W.
        cross: [in, in], C: rows belong to the full-precision input, columns to the quantized one.
        hessian: [in, in], H of the quantized input, weighted like `cross`.
        damping: as `gptq_round`; pass the same to both.

    Returns: [out, in], float32 (float64 for a float64 weight). `cross` equal to `hessian` gives back `weight`, and an
        input that is dead in the quantized stream keeps its weights.
    Raises: ValueError as `gptq_round`.
    """
    _check(weight, damping, hessian=hessian, cross=cross)
    with torch.no_grad():
        dtype = _factor_dtype(weight.shape[1])
        damped = _damped(hessian, damping, dtype)
        # W* - W = W (C - H) (H + l I)^-1: rounding errors then scale with the drift, not with the weight.
        drift = weight.to(dtype) @ (cross.to(dtype) - hessian.to(dtype))
        correction = torch.cholesky_solve(drift.T, _cholesky(damped, damping)).T
        target: Tensor = (weight.to(dtype) + correction).to(torch.promote_types(weight.dtype, torch.float32))
    return target


def _upper_factor_of_inverse(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with `H^-1 = U^T U`, H damped: `H = M M^T` with M upper triangular gives `U = M^-1`.

    M is the Cholesky factor of H with both axes reversed; the inverse of H itself is never formed.
    """
    damped = _damped(hessian, damping, _factor_dtype(hessian.shape[0]))
    upper = _cholesky(damped.flip(0, 1), damping).flip(0, 1)
    eye = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    factor: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return factor


def _damped(hessian: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """A copy of `hessian` with the damping on its diagonal. A dead input, which no other depends on, gets a typical one."""
    damped = hessian.to(dtype, copy=True)
    diagonal = damped.diagonal()
    live = diagonal[diagonal > 0].sort().values
    typical = live[: max(1, int(TYPICAL_SHARE * len(live)))].mean() if len(live) else torch.ones_like(diagonal[0])
    dead = diagonal == 0
    diagonal.add_(damping * diagonal.clamp_min(typical)).add_(dead * typical)
    return damped


def _cholesky(damped: Tensor, damping: float) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) and damped.dtype == torch.float32:
        factor, info = torch.linalg.cholesky_ex(damped.double())
        factor = factor.float()
    if int(info):
        raise ValueError(
            f"hessian is not positive definite with damping {damping} (pivot {int(info)} of {damped.shape[0]}): "
            "raise damping, calibrate on more tokens, or check that hessian is a sum of x x^T"
        )
    return factor


def _factor_dtype(in_features: int) -> torch.dtype:
    return torch.float64 if in_features <= LARGEST_FLOAT64_FEATURES else torch.float32


def _check(weight: Tensor, damping: float, **moments: Tensor) -> None:
    if not damping >= 0:
        raise ValueError(f"damping must not be negative, got {damping!r}")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating matrix [out, in], got {weight.dtype} {tuple(weight.shape)}")
    in_features = weight.shape[1]
    for name, moment in moments.items():
        if moment.shape != (in_features, in_features):
            raise ValueError(f"{name} must be [{in_features}, {in_features}] like weight, got {tuple(moment.shape)}")
    for name, tensor in {"weight": weight, **moments}.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(f"{name} holds {bad} NaN or infinite values of {tensor.numel()}")
    lowest = float(moments["hessian"].diagonal().min())
    if lowest < 0:
        raise ValueError(f"hessian has a negative diagonal entry ({lowest}): it must be a sum of w x x^T with w >= 0")
