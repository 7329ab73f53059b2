"""Settings of sparse attention that a loaded checkpoint may change: its weights and head kinds stay as they were calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, TypedDict

from reelquant.attention.sparse_spec import SparseAttentionSpec, dense_threshold, refresh_thresholds
from reelquant.noise_schedule import Schedule
from reelquant.ops.band_attention.op import Precision
from reelquant.settings.attention import Residual


class AttentionKnobs(TypedDict, total=False):
    """What may be changed; None, or leaving it out, keeps a knob as it is."""

    density: float | None
    """Share of the map that a sparse step visits."""
    dense_steps: int | None
    """First steps that run dense. They count the residual's first refresh: give them again with a residual of order 0."""
    dense_above: float | None
    """The same as a noise level."""
    interval: int | None
    """Steps from one refresh to the next; takes back `refresh_steps`."""
    refresh_steps: Sequence[int] | None
    """Steps that refresh, ascending, in place of the interval; empty for the interval."""
    refresh_at: Sequence[float] | None
    """The same as noise levels."""
    residual: Mapping[str, Any] | None
    """Fields of `Residual` to change: order, rank, extrapolation, storage, gain."""
    precision: Precision | None
    """Of all attention products."""


KNOBS = tuple(AttentionKnobs.__annotations__)


def changed(
    spec: SparseAttentionSpec, knobs: Mapping[str, Any], *, schedule: Schedule, num_steps: int
) -> SparseAttentionSpec:
    """`spec` with the `AttentionKnobs` given.

    Args:
        schedule: noise levels of a generation by its number of steps; asked for only where a knob counts steps.
        num_steps: of the generation in which they count.

    Raises:
        ValueError: names every knob that is unknown, contradicts another one, or has an impossible value.
    """
    given = {name: value for name, value in knobs.items() if value is not None}
    problems = [f"there is no knob {name}: one of {', '.join(KNOBS)}" for name in sorted(set(knobs) - set(KNOBS))]
    problems += _problems(given, num_steps)
    if problems:
        raise ValueError("sparse_attention: " + "; ".join(problems))
    plain = ("density", "dense_above", "interval", "precision")
    values: dict[str, Any] = {name: given[name] for name in plain if name in given}
    if "residual" in given:
        values["residual"] = Residual.from_dict({**spec.residual.to_dict(), **given["residual"]})
    residual = values.get("residual", spec.residual)
    if "dense_steps" in given:
        levels = schedule(num_steps)
        values["dense_above"] = dense_threshold(given["dense_steps"], levels, refreshes=residual.order > 0)
    if "refresh_steps" in given:
        values["refresh_at"] = refresh_thresholds(given["refresh_steps"], schedule(num_steps))
    elif "refresh_at" in given:
        values["refresh_at"] = tuple(given["refresh_at"])
    elif "interval" in given or not residual.order:
        values["refresh_at"] = ()
    return replace(spec, **values)


def _problems(given: Mapping[str, Any], num_steps: int) -> list[str]:
    problems = []
    for one, other in (("dense_steps", "dense_above"), ("refresh_steps", "refresh_at")):
        if one in given and other in given:
            problems.append(f"{one} and {other} are both given; give one of them")
    residual = given.get("residual", {})
    if not isinstance(residual, Mapping):
        problems.append(f"residual is {residual!r}; an object such as {{order: 1}}")
    else:
        names = [f.name for f in fields(Residual)]
        unknown = sorted(set(residual) - set(names))
        problems += [f"there is no residual.{name}: one of {', '.join(names)}" for name in unknown]
    steps = given.get("dense_steps", 0)
    if type(steps) is not int or not 0 <= steps < num_steps:
        problems.append(
            f"dense_steps is {steps!r}; a whole number from 0 to {num_steps - 1}, as {num_steps} are all steps"
        )
    return problems + refresh_problems(given.get("refresh_steps", ()), num_steps)


def refresh_problems(refresh_steps: Any, num_steps: int) -> list[str]:
    """What is wrong with `refresh_steps` of a generation with `num_steps`."""
    whole = isinstance(refresh_steps, Sequence) and all(
        type(step) is int and 0 <= step < num_steps for step in refresh_steps
    )
    if whole and all(before < after for before, after in pairwise(refresh_steps)):
        return []
    return [f"refresh_steps are {refresh_steps!r}; steps from 0 to {num_steps - 1}, ascending, each once"]
