"""How far two tensors lie apart, in decibels. Sums run in float64, piece by piece: a whole video is never copied."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PIECE_ELEMENTS = 1 << 22


def sqnr_db(reference: Tensor, x: Tensor) -> float:
    """Signal to quantization noise, `10 log10(sum reference² / sum (reference - x)²)` in dB.

    Any shape and real dtype, the same shape for both. Identical tensors give inf, NaN gives NaN.
    Raises ValueError for different shapes or empty tensors.
    """
    signal, noise = _energy_and_squared_error("reference", reference, "x", x)
    return _decibels(signal, noise)


def velocity_sqnr_db(reference: Tensor, velocity: Tensor) -> float:
    """SQNR of a velocity of the sampler, `10 log10(sum reference² / sum (reference - velocity)²)` in dB.

    Both are predictions from one latent, at one timestep, for one text (teacher forcing): nothing that went wrong at an
    earlier step counts again. For classifier-free guidance it is the guided combination, as the sampler takes it.

    Args:
        reference: of the full-precision model; any shape and real dtype.
        velocity: of the model that is measured, the same shape.

    Returns:
        inf for identical tensors, NaN for NaN. Sums run in float64.

    Raises:
        ValueError: different shapes, or empty tensors.
    """
    signal, noise = _energy_and_squared_error("reference", reference, "velocity", velocity)
    return _decibels(signal, noise)


def relative_error(reference: Tensor, x: Tensor) -> float:
    """`sum (reference - x)² / sum reference²`: what `velocity_sqnr_db` gives in decibels, as the number that averages.

    Identical tensors give 0, NaN gives NaN, a reference of zeros inf. Raises ValueError as `sqnr_db`.
    """
    signal, noise = _energy_and_squared_error("reference", reference, "x", x)
    if noise == 0.0:
        return 0.0
    return noise / signal if signal != 0.0 else math.inf


def trajectory_sqnr_db(errors: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """One number for the steps of a trajectory, `-10 log10(sum w e / sum w)` in dB.

    Args:
        errors: `relative_error` of the velocity at every step.
        weights: of the steps, not negative: the measured effect of each on the final latents. None weighs all alike.

    Returns:
        inf where no error counts.

    Raises:
        ValueError: no step, another number of weights, a negative one, or none above 0.
    """
    weights = [1.0] * len(errors) if weights is None else weights
    if not errors or len(weights) != len(errors):
        raise ValueError(
            f"there are {len(errors)} errors and {len(weights)} weights ({list(weights)}): give one weight a step"
        )
    if min(weights) < 0.0 or not sum(weights) > 0.0:
        raise ValueError(f"weights are {list(weights)}: none may be negative, and one must be above 0")
    noise = sum(weight * error for weight, error in zip(weights, errors, strict=True))
    return _decibels(sum(weights), noise)


def psnr_db(a: Tensor, b: Tensor, data_range: float = 1.0) -> float:
    """Peak signal to noise, `10 log10(data_range² / mean (a - b)²)` in dB; symmetric in `a` and `b`.

    `data_range` is the distance between the smallest and the largest possible value: 1 for videos in 0..1, 255 for
    uint8. The mean runs over all elements (for a video: over frames too). Identical tensors give inf, NaN gives NaN.
    Raises ValueError for different shapes, empty tensors, or a range that is not positive.
    """
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range!r}")
    _, squared_error = _energy_and_squared_error("a", a, "b", b)
    return _decibels(data_range**2, squared_error / a.numel())


def _energy_and_squared_error(first_name: str, first: Tensor, second_name: str, second: Tensor) -> tuple[float, float]:
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if first.numel() == 0:
        raise ValueError(f"{first_name} and {second_name} are empty: shape {tuple(first.shape)}")
    totals = torch.zeros(2, dtype=torch.float64, device=first.device)
    pieces = zip(
        first.detach().flatten().split(PIECE_ELEMENTS), second.detach().flatten().split(PIECE_ELEMENTS), strict=True
    )
    for piece, other in pieces:
        wide = piece.double()
        totals[0] += wide.square().sum()
        totals[1] += (wide - other.to(wide)).square_().sum()
    energy, squared_error = totals.tolist()
    return energy, squared_error


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf
