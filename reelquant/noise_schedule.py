"""The schedule of a generation as noise levels, and thresholds in it.

A noise level is in [0, 1], 1 for noise and 0 for the video: the timestep over the number of training timesteps. "The first n
steps" are the steps above a threshold, so that they mean the same part of a generation whatever the number of its steps, and
for both experts of a pipeline with two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Schedule = Callable[[int], Sequence[float]]
"""Noise levels of a generation by its number of steps."""
USUAL_STEPS = 50
"""Number of steps of a generation where nothing says otherwise (both papers)."""
USUAL_SHIFT = 7.0
"""HunyuanVideo's at 720p."""


def shifted_levels(num_steps: int, shift: float = USUAL_SHIFT) -> list[float]:
    """Noise levels of `num_steps` steps of flow matching with a shift: `shift s / (1 + (shift - 1) s)`, s from 1 to 1 / T."""
    linear = [1 - step / num_steps for step in range(num_steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in linear]


def threshold_after(num_steps: int, levels: Sequence[float]) -> float:
    """A noise level that the first `num_steps` of a schedule lie above, and no later one.

    Pipelines round timesteps to bfloat16: where rounding leaves two neighbours apart, the threshold separates them rounded
    or not.

    Args:
        num_steps: 0 to `len(levels)`, or more for all.
        levels: falling, in (0, 1].
    """
    if num_steps <= 0:
        return 1.0
    if num_steps >= len(levels):
        return 0.0
    above, below = levels[num_steps - 1], levels[num_steps]
    low, high = max(below, _rounded(below)), min(above, _rounded(above))
    return round((low + high) / 2 if low < high else (below + above) / 2, 6)


def _rounded(level: float) -> float:
    """The level of the timestep rounded to bfloat16 (8 significant bits), for 1000 training timesteps."""
    timestep, unit = level * 1000, 1.0
    while timestep / unit >= 256:
        unit *= 2
    while timestep / unit < 128 and unit > 2**-20:
        unit /= 2
    return round(timestep / unit) * unit / 1000
