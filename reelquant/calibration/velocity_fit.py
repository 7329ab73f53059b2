"""Fit of the sampler-side correction (method §9.4): full-precision velocity ~ gain * quantized velocity + bias.

Per step and latent channel, by least squares over all prompts and positions, shrunk towards gain 1 and bias 0. How much is
chosen by leaving out one prompt at a time; not to correct at all is among the choices. Only sums are kept.

Shapes: P prompts, T steps, C latent channels, N positions of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Strengths to choose from, relative to the sums that are divided by: 1 halves the correction."""
LEAST_PROMPTS = 3
"""With fewer, what is left after leaving one out is a single prompt, which says nothing of another one."""


class VelocityMoments:
    """Sums over the positions, float64 `[P, T, C]` each."""

    def __init__(self, num_prompts: int, num_steps: int, num_channels: int) -> None:
        shape = (num_prompts, num_steps, num_channels)
        names = ("count", "value", "value_sq", "error", "error_sq", "value_error", "reference_sq")
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name in names}

    @property
    def num_prompts(self) -> int:
        """P."""
        return len(self.sums["count"])

    def add(self, prompt: int, step: int, *, reference: Tensor, quantized: Tensor) -> None:
        """Adds the velocities `[C, ...]` of one step of one prompt; a step may be added in parts."""
        exact, value = (x.flatten(1).double() for x in (reference, quantized))
        error = exact - value
        found = {
            "count": torch.full((len(exact),), exact.shape[1], dtype=torch.float64),
            "value": value.sum(dim=1),
            "value_sq": value.square().sum(dim=1),
            "error": error.sum(dim=1),
            "error_sq": error.square().sum(dim=1),
            "value_error": (value * error).sum(dim=1),
            "reference_sq": exact.square().sum(dim=1),
        }
        for name, sums in self.sums.items():
            sums[prompt, step] += found[name].cpu()


@dataclass(frozen=True)
class VelocityFit:
    """What was fitted. Errors are `sum ||corrected - reference||^2 / sum ||reference||^2` on prompts left out of the fit."""

    ridge: float | None
    """The chosen strength; None: no correction is best."""
    gain: Tensor
    """`[T, C]` float64, of all prompts together."""
    bias: Tensor
    """`[T, C]` float64."""
    error_before: float
    error_after: float


def fit_velocity(moments: VelocityMoments) -> VelocityFit:
    """Gain and bias for all steps and channels, with one ridge strength for all.

    Raises:
        ValueError: fewer than `LEAST_PROMPTS` prompts.
    """
    num = moments.num_prompts
    if num < LEAST_PROMPTS:
        raise ValueError(f"a velocity correction needs {LEAST_PROMPTS} calibration prompts or more, there are {num}")
    size = max(float(moments.sums["reference_sq"].sum()), 1e-300)
    errors: dict[float | None, float] = {None: float(moments.sums["error_sq"].sum()) / size}
    for ridge in RIDGES:
        left_out = (_error(moments, prompt, *_solve(moments, ridge, without=prompt)) for prompt in range(num))
        errors[ridge] = sum(left_out) / size
    # A tie goes to no correction, which stands first.
    best = min(errors, key=lambda ridge: errors[ridge])
    if best is None:
        gain = torch.ones_like(moments.sums["count"][0])
        bias = torch.zeros_like(gain)
    else:
        gain, bias = _solve(moments, best, without=None)
    return VelocityFit(best, gain, bias, errors[None], errors[best])


def _solve(moments: VelocityMoments, ridge: float, *, without: int | None) -> tuple[Tensor, Tensor]:
    """Minimizes `sum (error - (gain - 1) value - bias)^2 + ridge (value_sq (gain - 1)^2 + count bias^2)`."""
    kept = [prompt for prompt in range(moments.num_prompts) if prompt != without]
    sums = {name: values[kept].sum(dim=0) for name, values in moments.sums.items()}
    aa, bb, ab = (1 + ridge) * sums["value_sq"], (1 + ridge) * sums["count"], sums["value"]
    determinant = (aa * bb - ab.square()).clamp_min(1e-300)
    change = (bb * sums["value_error"] - ab * sums["error"]) / determinant
    return 1 + change, (aa * sums["error"] - ab * sums["value_error"]) / determinant


def _error(moments: VelocityMoments, prompt: int, gain: Tensor, bias: Tensor) -> float:
    """`sum ||corrected - reference||^2` of one prompt."""
    sums = {name: values[prompt] for name, values in moments.sums.items()}
    change = gain - 1
    error = (
        sums["error_sq"]
        + change.square() * sums["value_sq"]
        + bias.square() * sums["count"]
        + 2 * change * bias * sums["value"]
        - 2 * change * sums["value_error"]
        - 2 * bias * sums["error"]
    )
    return float(error.sum())
