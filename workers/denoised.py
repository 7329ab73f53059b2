"""The denoised prediction of every step from its latents and its velocity, by the scheduler's own constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from reelquant.metrics import relative_error


def denoised_coefficients(scheduler: Any) -> list[tuple[float, float]]:
    """`(a, b)` of every step of the schedule that `scheduler` is set to: the denoised prediction is `a latents + b velocity`.

    | the model predicts | a | b |
    |---|---|---|
    | a flow | 1 | sigma of the last latents - sigma |
    | `v_prediction` | sqrt(abar) | -sqrt(1 - abar) |
    | `epsilon` | 1 / sqrt(abar) | -sqrt(1 - abar) / sqrt(abar) |
    | `sample` | 0 | 1 |

    Raises:
        ValueError: the scheduler says none of these.
    """
    config = scheduler.config
    prediction = config.get("prediction_type")
    if type(scheduler).__name__.startswith("FlowMatch") or prediction == "flow_prediction":
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        return [(1.0, sigmas[-1] - sigma) for sigma in sigmas[: len(scheduler.timesteps)]]
    if prediction == "sample":
        return [(0.0, 1.0)] * len(scheduler.timesteps)
    if prediction not in ("epsilon", "v_prediction") or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type {prediction!r} does not say how the denoised prediction follows "
            "from the model's output"
        )
    found = []
    for timestep in scheduler.timesteps:
        signal = float(scheduler.alphas_cumprod[int(timestep)])
        root, noise = signal**0.5, (1 - signal) ** 0.5
        found.append((root, -noise) if prediction == "v_prediction" else (1 / root, -noise / root))
    return found


def denoised_changes(
    latents: Sequence[Tensor], velocities: Sequence[Tensor], coefficients: Sequence[tuple[float, float]]
) -> list[float]:
    """`|x0 of step t - x0 of step t-1| / |x0 of step t-1|` for t = 1 .. T-1: `T-1` numbers.

    Args:
        latents: T or more tensors of one shape, those with which the steps begin.
        velocities: T tensors of that shape.
        coefficients: of `denoised_coefficients`.
    """
    changes, before = [], None
    for x, v, (a, b) in zip(latents, velocities, coefficients, strict=False):
        now = a * x.float() + b * v.float()
        if before is not None:
            changes.append(relative_error(before, now) ** 0.5)
        before = now
    return changes
