"""Which (prompt, timestep) candidates are worth calibrating on (salient data selection, S2Q-VDiT section 3.2).

A candidate's score is the product of two saliences, each min-max normalized over the pool: how much denoising changes
the latent there, or what `diffusion_features` has instead (`diffusion_salience`), and how much a weight error there costs
(`quantization_salience`, or on block inputs `spectral_norm_gram`, or with the real weight error `weight_error`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from reelquant.calibration.spectral_norm import spectral_norm_gram

CHUNK_ROWS = 4096


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
        changes.append((wide - before.double()).square().sum())
        energies.append(wide.square().sum())
    change, energy = torch.stack(changes), torch.stack(energies)
    zero = (energy == 0) & (change > 0)
    if bool(zero.any()):
        raise ValueError(f"latents[{int(zero.nonzero()[0]) + 1}] is zero throughout: its relative change is infinite")
    return (change / torch.where(energy == 0, 1.0, energy)).float()


def diffusion_features(latents: Tensor, sigmas: Sequence[float], feature: str) -> Tensor:
    """The rows whose changes `diffusion_salience` takes, so that its entry i belongs to step i, candidate i of a prompt.

    Step i reads `latents[i]` at `sigmas[i]` and makes `latents[i + 1]`. Under flow matching its network put out
    `v_i = (latents[i + 1] - latents[i]) / (sigmas[i + 1] - sigmas[i])`, and predicted `x0_i = latents[i] - sigmas[i] v_i`.

    | feature | rows | entry i is the relative change | first step |
    |---|---|---|---|
    | `latent` | `latents` | from the step's input to its result | like the others |
    | `output` | `v_0, v_0, v_1, ... v_{T-1}` | from step i - 1's output to step i's | 0: nothing to compare with |
    | `denoised` | the same of `x0` | from step i - 1's prediction to step i's | 0 |

    Args: `latents` [T + 1, ...] floating, of a deterministic Euler sampler, in float32: rounded to bfloat16 they are too
    coarse for their differences. `sigmas` [T + 1], falling, of which the last is that of `latents[T]`.
    Returns: [T + 1, ...], float32 (float64 for float64); for `latent`, `latents` itself.
    Raises: ValueError for another feature, another number of sigmas, or sigmas that do not fall.
    """
    if feature == "latent":
        return latents
    if feature not in ("output", "denoised"):
        raise ValueError(f"diffusion feature {feature!r} is unknown: latent, output or denoised")
    if len(sigmas) != len(latents) or len(sigmas) < 2:
        raise ValueError(f"there are {len(sigmas)} sigmas for {len(latents)} latents; one for each, two at least")
    if not all(before > after for before, after in pairwise(sigmas)):
        raise ValueError(f"sigmas must fall from step to step, got {list(sigmas)}")
    wide = torch.promote_types(latents.dtype, torch.float32)
    rows = torch.empty_like(latents, dtype=wide)
    for step, (before, after) in enumerate(pairwise(sigmas)):
        now = latents[step].double()
        velocity = (latents[step + 1].double() - now) / (after - before)
        rows[step + 1] = velocity if feature == "output" else now - before * velocity
    rows[0] = rows[1]
    return rows


def quantization_salience(tokens: Tensor) -> Tensor:
    """Spectral norm of `X^T X`, the Hessian of the layer error (S2Q-VDiT eq. for C_quant).

    `tokens` [L, d] floating; returns a float32 scalar. Errors as `spectral_norm_gram`.
    """
    return spectral_norm_gram(tokens)


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


def _check_finite(name: str, x: Tensor) -> None:
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} NaN or infinite values of {x.numel()}, shape {tuple(x.shape)}")
