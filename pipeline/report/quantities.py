"""Numbers as a person reads them: always with their unit."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.study.estimators import Estimate
from pipeline.study.intervals import Interval
from reelquant.calibration.block_rounding import EXACT_DB

NOTHING = "–"
"""Stands where there is no number."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a few values."""

    mean: float
    sd: float | None
    """Of the sample (n - 1); None for a single value."""
    num: int


def spread(values: Iterable[float]) -> Spread | None:
    """None for no values."""
    found = list(values)
    if not found:
        return None
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def spread_text(value: Spread | None, digits: int = 2) -> str:
    """Such as `24.31 ± 1.20`."""
    if value is None:
        return NOTHING
    mean = f"{value.mean:.{digits}f}"
    return mean if value.sd is None else f"{mean} ± {value.sd:.{digits}f}"


def decibels_text(value: Spread | None) -> str:
    """As `spread_text`; where all videos are identical, the workers' cap of 100 dB is named as one."""
    if value is not None and value.mean >= EXACT_DB:
        return f"≥ {EXACT_DB:.0f}"
    return spread_text(value)


def interval_text(found: Interval | None) -> str:
    """Such as `26.31 ± 0.24`: a mean and half of its interval."""
    if found is None:
        return NOTHING
    return f"{found.mean:.2f}" + ("" if found.half_width is None else f" ± {found.half_width:.2f}")


def estimate_text(found: Estimate | None) -> str:
    """A difference, such as `+0.42 [+0.11, +0.73]`."""
    if found is None:
        return NOTHING
    if found.low is None or found.high is None:
        return f"{found.value:+.2f}"
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def share_text(found: Estimate | None) -> str:
    """Such as `4 % [1, 9]`."""
    if found is None:
        return NOTHING
    low, high = found.low or 0.0, found.high or 0.0
    return f"{100 * found.value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def bytes_text(num_bytes: float | None) -> str:
    """Such as `6.49 GiB`."""
    if num_bytes is None:
        return NOTHING
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.{2 if value < 100 else 1}f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def seconds_text(seconds: float | None) -> str:
    """Such as `5 ms`, `3.07 s`, `12 min 30 s` or `5 h 06 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def fraction_text(part: int, whole: int) -> str:
    """Such as `14 of 16 (88 %)`."""
    return f"{part} of {whole} ({part / whole:.0%})".replace("%", " %") if whole else NOTHING


def value_text(value: Any) -> str:
    """A value of a configuration, such as `weight 4, activation 6` for an object."""
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(value_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_text(inner)}" for key, inner in value.items())
    return str(value)
