"""Estimators for paired comparisons of settings: robust to forked videos, and honest about videos and calibrations.

| question | estimator |
|---|---|
| the mean over videos x calibrations, and its interval | `crossed_interval` |
| the typical paired difference, whatever a few videos do | `hodges_lehmann` |
| a share of videos, such as that of forks | `wilson_interval` |
| the same over videos x calibrations | `crossed_share` |
| whether two such shares of the same videos differ | `mcnemar` |
| from which PSNR on a video is a fork | `valley` |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pipeline.study.intervals import Interval, t_quantile

EXACT_FROM, EXACT_TO = 6, 200
"""Numbers of differences between which the signed-rank distribution is computed exactly; fewer bound nothing at 95 %."""
_GRID_DB = 0.05
_DEEP = 0.5
_FEWEST = 3


@dataclass(frozen=True)
class Estimate:
    """A value and where the true one lies, at some level of confidence; not symmetric."""

    value: float
    low: float | None
    """None where there is too little to bound it."""
    high: float | None
    num: int


def crossed_interval(values: Mapping[int, Mapping[str, float]], confidence: float = 0.95) -> Interval | None:
    """Mean over two crossed random factors, calibrations and videos, with its interval.

    With variance components s_v² of the videos, s_c² of the calibrations and s_vc² of what is left, and V videos, C
    calibrations, `var(mean) = s_v²/V + s_c²/C + s_vc²/(V C)`. The components are those of the analysis of variance,
    none below 0; t has Satterthwaite's degrees of freedom of the sum, rounded down (Searle, Casella, McCulloch, Variance
    Components, 1992, chapter 4; Satterthwaite, Biometrics Bulletin 2, 1946).

    One calibration: the interval is over the videos alone, and says nothing of another calibration. One video: likewise.

    Args:
        values: by calibration, and in it by video. Videos that a calibration lacks are left out.

    Returns:
        None for no common video. `num` is the number of values. `half_width` is None for a single one.
    """
    found = _common(values)
    return None if found is None else crossed_mean(found, confidence)


def _common(values: Mapping[int, Mapping[str, float]]) -> NDArray[np.float64] | None:
    """The table `[calibrations, videos]` of the videos that all calibrations with any have; None without such a video."""
    rows = [row for row in values.values() if row]
    common = [video for video in rows[0] if all(video in row for row in rows)] if rows else []
    return np.array([[row[video] for video in common] for row in rows], dtype=float) if common else None


def crossed_mean(values: NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """`crossed_interval` of a whole table `[calibrations, videos]`."""
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, None, 1)
    (of_c, df_c), (of_v, df_v), (of_rest, df_rest) = _mean_squares(values)
    # As multiples of the mean squares the sum of the components is (MS_c + MS_v - MS_rest) / (V C).
    terms = [(of_c, df_c), (of_v, df_v), (-of_rest, df_rest)] if df_rest else [(of_c + of_v, df_c + df_v)]
    if df_rest:
        if of_c <= of_rest and of_v <= of_rest:
            terms = [(of_rest, df_rest)]
        elif of_c <= of_rest:
            terms = [(of_v, df_v)]
        elif of_v <= of_rest:
            terms = [(of_c, df_c)]
    total = sum(term for term, _ in terms)
    if total <= 0.0:
        return Interval(mean, 0.0, values.size)
    degrees = total**2 / sum(term**2 / df for term, df in terms)
    # A single term gives a whole number, which rounding may have put just below itself.
    quantile = t_quantile(0.5 + confidence / 2, max(1, int(degrees + 1e-9)))
    return Interval(mean, quantile * math.sqrt(total / values.size), values.size)


def _mean_squares(values: NDArray[np.float64]) -> tuple[tuple[float, int], ...]:
    """Of the calibrations, the videos and the rest, with degrees of freedom; 0.0 where there are none."""
    num_c, num_v = values.shape
    c_means, v_means, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    rest = values - c_means[:, None] - v_means[None, :] + mean
    sums = (num_v * ((c_means - mean) ** 2).sum(), num_c * ((v_means - mean) ** 2).sum(), (rest**2).sum())
    degrees = (num_c - 1, num_v - 1, (num_c - 1) * (num_v - 1))
    return tuple((float(squares) / df if df else 0.0, df) for squares, df in zip(sums, degrees, strict=True))


def hodges_lehmann(differences: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """Median of the averages of all pairs of differences, each with itself too (Walsh), and the interval that inverts
    Wilcoxon's signed-rank test (Hollander, Wolfe, Nonparametric Statistical Methods, section 3.2 and 3.3).

    Exact for `EXACT_FROM` to `EXACT_TO` differences, by the normal approximation above. None for no difference.
    """
    num = len(differences)
    if not num:
        return None
    values = np.asarray(differences, dtype=float)
    first, second = np.triu_indices(num)
    walsh = np.sort((values[first] + values[second]) / 2)
    middle = float(np.median(walsh))
    outside = _signed_rank_quantile(num, (1 - confidence) / 2)
    if outside < 1:
        return Estimate(middle, None, None, num)
    return Estimate(middle, float(walsh[outside - 1]), float(walsh[len(walsh) - outside]), num)


def _signed_rank_quantile(num: int, tail: float) -> int:
    """The largest k such that a signed-rank sum is below k with a probability of `tail` at most."""
    if num > EXACT_TO:
        deviation = math.sqrt(num * (num + 1) * (2 * num + 1) / 24)
        return int(num * (num + 1) / 4 + NormalDist().inv_cdf(tail) * deviation)
    probabilities = np.zeros(num * (num + 1) // 2 + 1)
    probabilities[0] = 1.0
    for rank in range(1, num + 1):
        shifted = np.concatenate([np.zeros(rank), probabilities[: len(probabilities) - rank]])
        probabilities = (probabilities + shifted) / 2
    return int(np.searchsorted(np.cumsum(probabilities), tail, side="right"))


def wilson_interval(hits: float, num: float, confidence: float = 0.95) -> Estimate | None:
    """A share and its interval (Wilson, 1927), which is inside 0 to 1 also for none and for all. None for `num` 0.

    An effective number of values need not be whole; the estimate's is rounded.
    """
    if not num:
        return None
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = hits / num, z * z / num
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / num + spread / (4 * num))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), round(num))


def crossed_share(values: Mapping[int, Mapping[str, bool]], confidence: float = 0.95) -> Estimate | None:
    """A share over two crossed random factors, calibrations and videos, with Wilson's interval of the effective number.

    Calibrations of one video fork alike, so V C pairs tell less than as many videos. The effective number is V C by the
    design effect (Kish, Survey Sampling, 1965, section 8.2, here of two factors), the variance of the mean over that of V C
    independent values: `(C s_v² + V s_c² + s_vc²) / (s_v² + s_c² + s_vc²)` with the components of `crossed_interval`. It is C
    where all calibrations are alike, 1 where neither factor matters. Wilson's interval with an effective number: Dean, Pagano,
    Journal of Survey Statistics and Methodology 3, 2015. Where no pair is a hit, or all are, calibrations count as alike.
    z is that of known components: it covers 0.86 to 0.98 where videos differ, and down to 0.78 (independent pairs: 0.43) where
    half of the variance is that of three to five calibrations.

    Args:
        values: by calibration, and in it by video. Videos that a calibration lacks are left out.

    Returns:
        None for no common video. `num` is the number of pairs.
    """
    found = _common(values)
    if found is None:
        return None
    num_c, num_v = found.shape
    (of_c, _), (of_v, _), (rest, _) = _mean_squares(found)
    of_c, of_v = max(0.0, of_c - rest) / num_v, max(0.0, of_v - rest) / num_c
    total = of_c + of_v + rest
    effect = (num_c * of_v + num_v * of_c + rest) / total if total > 0.0 else float(num_c)
    effective = found.size / effect
    interval = wilson_interval(float(found.mean()) * effective, effective, confidence)
    return None if interval is None else replace(interval, num=found.size)


def mcnemar(first: Mapping[int, Mapping[str, bool]], second: Mapping[int, Mapping[str, bool]]) -> float | None:
    """Two-sided p of whether as many videos fork under one setting as under the other; both by calibration and video.

    Under the null hypothesis a video's two settings may be exchanged, in all its calibrations at once, which turns the sign
    of its difference of forks. The p is the share of all 2^V signs with a sum of differences at least as large (Fisher, The
    Design of Experiments, 1935, section 21), counted exactly. Of one calibration it is McNemar's exact test.

    Returns:
        None where the two have no video of one calibration in common.
    """
    differences: dict[str, int] = {}
    for calibration, videos in first.items():
        for video in videos.keys() & second.get(calibration, {}).keys():
            apart = int(videos[video]) - int(second[calibration][video])
            differences[video] = differences.get(video, 0) + apart
    if not differences:
        return None
    num_signs = Counter({0: 1})
    for apart in differences.values():
        turned: Counter[int] = Counter()
        for total, num in num_signs.items():
            turned[total + apart] += num
            turned[total - apart] += num
        num_signs = turned
    observed = abs(sum(differences.values()))
    return sum(num for total, num in num_signs.items() if abs(total) >= observed) / num_signs.total()


def valley(values: Sequence[float]) -> float | None:
    """The deepest valley between two modes of a distribution, such as of PSNRs in dB: below it are the forks.

    The density is a sum of Gaussians with Silverman's width, `0.9 min(s, IQR / 1.34) n^-0.2`. A valley counts where the
    density is at most half of both the highest peak before it and the highest one behind it, and `_FEWEST` values or more lie
    on either side.

    Returns:
        None where there is none: one mode, or too few values.
    """
    data = np.sort(np.asarray(values, dtype=float))
    if len(data) < 2 * _FEWEST:
        return None
    quartiles = np.percentile(data, [25, 75])
    scales = [s for s in (float(data.std(ddof=1)), float(quartiles[1] - quartiles[0]) / 1.34) if s > 0]
    if not scales:
        return None
    width = 0.9 * min(scales) * len(data) ** -0.2
    grid = np.arange(data[_FEWEST - 1], data[-_FEWEST], _GRID_DB)
    if not len(grid):
        return None
    padded = np.arange(data[0] - 3 * width, data[-1] + 3 * width, _GRID_DB)
    before = np.maximum.accumulate(_density(data, width, padded))
    behind = np.maximum.accumulate(_density(data, width, padded)[::-1])[::-1]
    lower = np.minimum(np.interp(grid, padded, before), np.interp(grid, padded, behind))
    depth = _density(data, width, grid) / lower
    deepest = int(np.argmin(depth))
    return float(grid[deepest]) if depth[deepest] <= _DEEP else None


def _density(data: NDArray[np.float64], width: float, places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Up to a factor."""
    total = np.zeros(len(places))
    for value in data:
        total += np.exp(-0.5 * ((places - value) / width) ** 2)
    return total
