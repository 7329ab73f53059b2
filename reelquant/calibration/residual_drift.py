"""How the residual of sparse attention drifts from step to step: gains that damp it, and where refreshes pay most (SSAR).

The residual `D(t)`, what the band misses of dense attention at step t, is taken at some query rows of every head and block
while a model runs over a stored trajectory with dense attention. Used at step t in place of `D(t)`, `beta D(r)` of an earlier
step leaves the relative squared error

    e(r, t) = ||D(t) - beta D(r)||^2 / ||dense(t)||^2

of which the sums over blocks and prompts are all that is kept, for every pair of steps.

Shapes: T steps, H heads, L tokens, R sampled rows, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reelquant.attention.head_kind import row_masks
from reelquant.attention.sparse_spec import SparseAttentionSpec, refresh_thresholds
from reelquant.settings.attention import LARGEST_GAIN
from reelquant.tokens import TokenLayout

MOST_LAGS = 16
"""Lags that get a gain of their own."""
_DIGITS = 6


def missed_rows(
    q: Tensor, k: Tensor, v: Tensor, *, kinds: str, layout: TokenLayout, width: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """What the band of each head misses at some rows, and the dense attention there: float32 `[H, R, D]` each.

    Args:
        q, k, v: `[H, L, D]`, after normalization and rotary embedding.
        kinds: one letter a head, `s` or `t`.
        rows: `[R]` indices of video tokens.
    """
    masks, missed, full = row_masks(layout, rows, width), [], []
    with torch.no_grad():
        for head, kind in enumerate(kinds):
            scores = q[head, rows].float() @ k[head].float().T * q.shape[2] ** -0.5
            values = v[head].float()
            dense = scores.softmax(dim=1) @ values
            banded = scores.masked_fill(~masks["st".index(kind)], float("-inf")).softmax(dim=1) @ values
            missed.append(dense - banded)
            full.append(dense)
    return torch.stack(missed), torch.stack(full)


class ResidualDrift:
    """Sums over blocks and prompts of products of residuals, for every pair of steps: float64 `[T, T]` each.

    Attributes:
        cross: `<D(r), D(t)> / ||dense(t)||^2` at `[r, t]`.
        square: `||D(r)||^2 / ||dense(t)||^2` at `[r, t]`.
        num: blocks and prompts that were added.
    """

    def __init__(self, num_steps: int) -> None:
        self.cross = torch.zeros(num_steps, num_steps, dtype=torch.float64)
        self.square = torch.zeros(num_steps, num_steps, dtype=torch.float64)
        self.num = 0

    def add(self, residuals: Tensor, norms: Sequence[float]) -> None:
        """Adds one block of one prompt.

        Args:
            residuals: `[T, ...]`, flattened step by step.
            norms: `||dense(t)||^2` at the same rows, `[T]`.
        """
        rows = residuals.flatten(1).double()
        gram = rows @ rows.T
        scale = torch.tensor(norms, dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
        self.cross += gram / scale
        self.square += gram.diagonal().unsqueeze(1) / scale
        self.num += 1

    def errors(self, gain: Tensor | float = 1.0) -> Tensor:
        """Mean `e(r, t)` over blocks and prompts, at `[r, t]`; `gain` is beta, one number or `[T, T]`."""
        total = self.cross.diagonal() - 2 * gain * self.cross + gain * gain * self.square
        return total / max(1, self.num)

    def gain(self, first: int) -> tuple[float, ...]:
        """Least-squares factor by lag, over all pairs of steps from `first` on; empty where there is no pair."""
        found = []
        for lag in range(1, min(MOST_LAGS, len(self.cross) - first - 1) + 1):
            cross, square = (sums[first:, first:].diagonal(lag).sum() for sums in (self.cross, self.square))
            beta = float(cross / square) if square > 0 else 1.0
            found.append(round(min(max(beta, 0.0), LARGEST_GAIN), _DIGITS))
        return tuple(found)


def placed_refreshes(errors: Tensor, num: int) -> list[int]:
    """The `num` steps whose refreshes leave the least error in sum, ascending; step 0 is always one of them.

    Args:
        errors: `[T, T]`, that of step t at `[r, t]` when the last refresh was at step r.
        num: 1 to T.

    By dynamic programming over (refreshes so far, last refresh).
    Raises: ValueError for another `num`.
    """
    steps = len(errors)
    if not 1 <= num <= steps:
        raise ValueError(f"cannot place {num} refreshes in {steps} steps; 1 to {steps}")
    # until[r, t]: what steps r + 1 ... t - 1 leave when the refresh is at r.
    until = torch.cat([torch.zeros(steps, 1, dtype=torch.float64), errors.double().triu(1).cumsum(dim=1)], dim=1)
    best = until[0, :].clone()  # of a schedule whose last refresh lies before t, by t
    lasts: list[list[int]] = []
    for count in range(1, num):
        ways = torch.full((steps, steps + 1), float("inf"), dtype=torch.float64)
        for last in range(count, steps):
            ways[last, last + 1 :] = best[last] + until[last, last + 1 :]
        best, at = ways.min(dim=0)
        lasts.append(at.tolist())
    chosen, end = [], steps
    for at_end in reversed(lasts):
        chosen.append(at_end[end])
        end = chosen[-1]
    return [0, *reversed(chosen)]


@dataclass(frozen=True)
class MeasuredResidual:
    """What the drift of a method's residual says of its sparse attention."""

    gain: tuple[float, ...] | None
    """By lag; None where it was not asked for."""
    refresh_steps: tuple[int, ...] | None
    """Of the calibration's schedule; None where they were not asked for."""
    refresh_at: tuple[float, ...] | None
    """The same as noise levels."""
    error_before: float
    """Mean relative squared error of the sparse steps' attention under the interval, with order 1 and no gain."""
    error_after: float
    """The same with these refreshes and gains."""

    def applied(self, spec: SparseAttentionSpec) -> SparseAttentionSpec:
        """`spec` with what was measured."""
        residual = spec.residual if self.gain is None else replace(spec.residual, gain=self.gain)
        return replace(
            spec, residual=residual, refresh_at=spec.refresh_at if self.refresh_at is None else self.refresh_at
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        lists = {"gain": self.gain, "refresh_steps": self.refresh_steps, "refresh_at": self.refresh_at}
        values = {name: None if value is None else list(value) for name, value in lists.items()}
        return {**values, "error_before": self.error_before, "error_after": self.error_after}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MeasuredResidual:
        """From the JSON values of `to_dict`."""
        lists = {
            name: None if values[name] is None else tuple(values[name])
            for name in ("gain", "refresh_steps", "refresh_at")
        }
        return cls(**lists, error_before=values["error_before"], error_after=values["error_after"])


def measured_residual(
    drift: ResidualDrift, spec: SparseAttentionSpec, noise_levels: Sequence[float], *, gain: bool, placed: bool
) -> MeasuredResidual:
    """Gains and refreshes for `spec`.

    Refreshes are placed for a residual of order 1 without a gain, as many as the interval of `spec` has; its dense first steps
    stay, and the first refresh with them.

    Args:
        noise_levels: `[T]`, of the trajectories.
        gain, placed: what is asked for.
    """
    first = sum(level > spec.dense_above for level in noise_levels)
    by_interval = replace(spec, refresh_at=())
    plain = drift.errors()
    steps, thresholds, schedule = None, None, spec
    if placed and first < len(noise_levels):
        num = by_interval.schedule(noise_levels)[first:].count("refresh")
        steps = tuple(first + step for step in placed_refreshes(plain[first:, first:], num))
        thresholds = refresh_thresholds(steps, noise_levels)
        schedule = replace(spec, refresh_at=thresholds)
    factors = drift.gain(first) if gain else ()
    lags = torch.arange(len(plain)).unsqueeze(0) - torch.arange(len(plain)).unsqueeze(1)
    residual = replace(spec.residual, order=1, gain=factors or None)
    betas = torch.tensor([[residual.gain_at(lag) for lag in row] for row in lags.tolist()], dtype=torch.float64)
    return MeasuredResidual(
        factors or None,
        steps,
        thresholds,
        _mean_error(plain, by_interval, noise_levels),
        _mean_error(drift.errors(betas), schedule, noise_levels),
    )


def _mean_error(errors: Tensor, spec: SparseAttentionSpec, noise_levels: Sequence[float]) -> float:
    """Of the sparse steps; 0 where there is none."""
    found, last = [], 0
    for step, kind in enumerate(spec.schedule(noise_levels)):
        if kind == "refresh":
            last = step
        elif kind == "sparse":
            found.append(float(errors[last, step]))
    return sum(found) / len(found) if found else 0.0
