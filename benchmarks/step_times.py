"""Mean denoising step at full size of the knobs that a study measured: from the steps of each kind in dit_step.json.

| row | steps are those of |
|---|---|
| dense attention, and dense steps | `ours 100 %`, in the row's precision |
| 15 or 25 % in a sparse step, with a residual | `ours 15 %` or `ours 25 %`, in the row's precision, by kind of step |

Other densities, and sparse steps without a residual, were not timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.dit_step.schedule import SCHEDULE, step_kinds
from reelquant.attention.sparse_spec import SparseAttentionSpec, dense_threshold
from reelquant.noise_schedule import shifted_levels
from reelquant.settings.attention import Residual

Attention = dict[str, Any]
"""A method's section `attention`, or of it what a setting of one checkpoint changes; None leaves as it is."""


@dataclass(frozen=True)
class StepTime:
    """At full size."""

    seconds: float
    peak_bytes: int


def step_time(attention: Attention, results: Mapping[str, Mapping[str, Any]]) -> StepTime | None:
    """The mean of a schedule's steps with this attention; None where its kinds of steps were not timed.

    Args:
        attention: resolved; `enabled: False` is dense attention.
        results: of dit_step.json.
    """
    suffix = "" if attention["precision"] == "full" else ", 8-bit attention"
    if suffix and attention["precision"] != "int8_fp8":
        return None
    dense = results[f"ours 100 %{suffix}"]
    if attention.get("enabled") is False:
        return StepTime(dense["mean_s"], dense["peak_bytes"])
    sparse = results.get(f"ours {100 * attention['density']:.0f} %{suffix}")
    if sparse is None or attention["residual"]["order"] == 0 or attention["dense_layers"]:
        return None
    kinds = {**sparse["by_kind_s"], "dense": dense["mean_s"]}
    total = sum(num * kinds[kind] for kind, num in _counts(attention).items())
    return StepTime(total / SCHEDULE, max(sparse["peak_bytes"], dense["peak_bytes"]))


def attention_of(document: Mapping[str, Any], row: str) -> Attention | None:
    """The attention of a study's row: `SETTING`, or `SETTING / NAME` for another setting of its checkpoint. None for rows that
    belong to no setting, and where attention is dense throughout."""
    name, _, knobs = row.partition(" / ")
    configuration = document.get("configurations", {}).get(name)
    if configuration is None or configuration["method"]["attention"]["density"] == 1:
        return None
    attention: Attention = configuration["method"]["attention"]
    return _changed(attention, configuration["evaluation"]["settings"][knobs]) if knobs else attention


def _counts(attention: Attention) -> Counter[str]:
    """Steps of each kind. Placed refreshes are as many as those of the interval."""
    residual = attention["residual"]
    levels = shifted_levels(SCHEDULE)
    spec = SparseAttentionSpec(
        density=attention["density"],
        dense_above=dense_threshold(attention["dense_steps"], levels, refreshes=True),
        interval=attention["interval"],
        residual=Residual(order=residual["order"], rank=residual["rank"], extrapolation=residual["extrapolation"]),
    )
    return Counter(step_kinds(spec, SCHEDULE))


def _changed(attention: Attention, knobs: Attention) -> Attention:
    """`attention` with what `knobs` gives, section by section."""
    found = dict(attention)
    for key, value in knobs.items():
        if isinstance(value, dict):
            found[key] = _changed(found.get(key) or {}, value)
        elif value is not None:
            found[key] = value
    return found
