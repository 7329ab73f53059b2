"""Mean and confidence interval of a few values, by Student's t distribution. Needs the standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and where the true one lies, at some level of confidence."""

    mean: float
    half_width: float | None
    """The interval is `mean ± half_width`; None for a single value."""
    num: int

    @property
    def low(self) -> float | None:
        """Lower end."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end."""
        return None if self.half_width is None else self.mean + self.half_width


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """`mean ± t s / sqrt(n)` with the sample's standard deviation s; None for no values."""
    if not values:
        return None
    mean, num = statistics.fmean(values), len(values)
    if num == 1:
        return Interval(mean, None, 1)
    error = statistics.stdev(values) / math.sqrt(num)
    return Interval(mean, t_quantile(0.5 + confidence / 2, num - 1) * error, num)


def t_quantile(probability: float, degrees: int) -> float:
    """The t of which `t_cdf` is `probability`, to about 1e-12 relative.

    Raises:
        ValueError: a probability outside 0.5 to 1 (without 1), or no degree of freedom.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"probability is {probability} and degrees {degrees}: 0.5 <= probability < 1 and degrees >= 1")
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return high


def t_cdf(t: float, degrees: int) -> float:
    """Probability of a value of at most `t >= 0` (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cos_squared = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(1 + odd, degrees - 2, 2):
        term *= k / (k + 1) * cos_squared
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + inside / 2
