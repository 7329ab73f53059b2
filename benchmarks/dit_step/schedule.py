"""Which steps a schedule with sparse attention has, and its mean from fewer steps than it has.

    dense_steps = 0    R s s s s   r S S S S   r S S S S   …
    dense_steps = 5    d d d d R   s s s s r   S S S S r   …

| kind | what it computes |
|---|---|
| `dense` (d) | dense attention |
| `first refresh` (R) | dense and band attention, the residual's factors; nothing before it to compare with, or order 1 |
| `first sparse` (s) | band attention and one correction |
| `refresh` (r) | dense and band attention, factors of the residual and of its change |
| `sparse` (S) | band attention and two corrections |
| `bare sparse` | band attention alone: a residual of order 0 |
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.noise_schedule import shifted_levels

SCHEDULE = 50
MEASURED = "measured"
COMPUTED = "from the steps of each kind"


def level_of_step(step: int) -> float:
    """Noise level of a step of the schedule; steps beyond it repeat its last one."""
    return shifted_levels(SCHEDULE)[min(step, SCHEDULE - 1)]


def step_kinds(spec: SparseAttentionSpec, num: int) -> list[str]:
    """The kind of each of the first `num` steps of a generation."""
    kinds: list[str] = []
    has_change = False
    for kind in spec.schedule([level_of_step(step) for step in range(num)]):
        if kind == "refresh":
            earlier = kinds[-1:] if spec.residual.compares_adjacent_steps else kinds
            has_change = spec.residual.order == 2 and any(name.endswith("refresh") for name in earlier)
            kinds.append("refresh" if has_change else "first refresh")
        elif kind == "dense":
            kinds.append("dense")
        elif spec.residual.order == 0:
            kinds.append("bare sparse")
        else:
            kinds.append("sparse" if has_change else "first sparse")
    return kinds


def fewest_steps(spec: SparseAttentionSpec) -> int:
    """So many first steps have every kind; the next one is a refresh."""
    return spec.schedule(shifted_levels(SCHEDULE)).index("refresh") + 2 * spec.interval


def mean_step(seconds: Sequence[float], spec: SparseAttentionSpec) -> tuple[float, str]:
    """Mean of the steps of a whole schedule, and how it was found: `measured`, if all were; else each kind's median, as often
    as a whole schedule has it.

    Args:
        seconds: of the first steps of a generation.

    Raises:
        ValueError: names the kinds of which there is no step.
    """
    if len(seconds) == SCHEDULE:
        return statistics.fmean(seconds), MEASURED
    found = by_kind(seconds, spec)
    counts = Counter(step_kinds(spec, SCHEDULE))
    if missing := sorted(set(counts) - set(found)):
        raise ValueError(
            f"{len(seconds)} steps have none of kind {', '.join(missing)}: run {fewest_steps(spec)} or more"
        )
    return sum(found[kind] * num for kind, num in counts.items()) / SCHEDULE, COMPUTED


def by_kind(seconds: Sequence[float], spec: SparseAttentionSpec) -> dict[str, float]:
    """Median seconds of the steps of each kind."""
    found: dict[str, list[float]] = {}
    for kind, value in zip(step_kinds(spec, len(seconds)), seconds, strict=True):
        found.setdefault(kind, []).append(value)
    return {kind: statistics.median(values) for kind, values in found.items()}
