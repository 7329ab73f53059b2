"""Sparse attention and its residual cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from reelquant.settings.declaration import Bounds, Settings

Precision = Literal["full", "int8_16", "int8_fp8"]
LARGEST_GAIN = 2.0


@dataclass(frozen=True)
class Residual(Settings):
    """Residual cache of sparse attention (SSAR, QuantSparse §3.3)."""

    ADDED = frozenset({"gain"})
    SECTION = "sparse_attention.residual"

    order: Literal[0, 1, 2] = 2
    """0 for none; 1 adds what the band missed at the last refresh, 2 also how that changed since the refresh before."""
    rank: Annotated[int, Bounds(ge=1)] | None = 16
    """Of the projection (QuantSparse: 16); null for none."""
    extrapolation: Literal["constant", "linear", "adjacent"] = "linear"
    """Of the change, with order 2: `linear` scales it with the steps since the refresh; `constant` adds it whole
    (QuantSparse, equation 14), which measured 1 dB worse on the small model. `adjacent` adds the change since the step before
    the refresh (Proposition 3.3) where that step was dense, as after `dense_steps`; later refreshes are then of order 1. It
    computes the band at the dense first steps too."""
    storage: Literal["full", "low_rank", "low_rank_int8"] = "low_rank"
    """`full` keeps whole residuals and projects the change only, as the paper's formula says; `low_rank` keeps factors,
    `low_rank_int8` their long side in 8 bits: half the memory."""
    gain: tuple[Annotated[float, Bounds(ge=0, le=LARGEST_GAIN)], ...] | Literal["calibrated"] | None = None
    """With order 1: factors on the residual 1, 2, ... steps after its refresh, the last one for all later steps; it costs
    nothing. `calibrated`: by least squares on the first calibration trajectories. null: 1."""

    @property
    def compares_adjacent_steps(self) -> bool:
        """Whether a step's residual is of use to the step after it, so that dense steps keep theirs."""
        return self.order == 2 and self.extrapolation == "adjacent"

    def gain_at(self, lag: int) -> float:
        """Factor on the residual `lag` steps after its refresh."""
        assert self.gain != "calibrated"
        return 1.0 if self.gain is None or lag < 1 else self.gain[min(lag, len(self.gain)) - 1]

    def problems(self, head_dim: int | None = None) -> list[str]:
        """All reasons why it cannot be, for heads of `head_dim` if that is known."""
        found = self.impossible_values("residual.")
        if found:
            return found
        if self.rank is not None and head_dim is not None and self.rank > head_dim:
            found.append(f"residual.rank is {self.rank}, above the head size {head_dim}; at most {head_dim}, or none")
        if self.storage != "full" and self.rank is None and self.order > 0:
            found.append(f"residual.storage {self.storage} needs residual.rank; give a rank, or set storage: full")
        if self.gain == ():
            found.append("residual.gain is empty; give factors, one a lag, calibrated, or null")
        if self.gain is not None and self.order != 1:
            found.append(
                f"residual.gain damps a residual of order 1, but residual.order is {self.order}; set order: 1, or gain: null"
            )
        return found


@dataclass(frozen=True)
class BandAttention(Settings):
    """Settings of sparse attention that a run's configuration and a checkpoint share."""

    density: Annotated[float, Bounds(gt=0, le=1)] = 1.0
    """Share of the attention map that a sparse step visits, at most: the widest band that stays below is taken; 1 is dense."""
    interval: Annotated[int, Bounds(ge=1)] = 5
    """Steps from one refresh to the next (QuantSparse: 5); a refresh runs dense."""
    residual: Residual = Residual()
    """Residual cache."""
    precision: Precision = "full"
    """Of attention's products while generating, dense steps too: that of the model; INT8 scores; INT8 scores with e4m3 weights
    and values, the fastest on Hopper. CUDA GPUs before Hopper run in full precision."""


@dataclass(frozen=True)
class SparseAttention(BandAttention):
    """Sparse attention of a method (method §6)."""

    ADDED = frozenset({"refresh_steps"})

    head_kinds: Literal["offline", "online"] = "offline"
    """Spatial and temporal heads: found once from the calibration samples, or anew while generating."""
    dense_steps: Annotated[int, Bounds(ge=0)] = 0
    """First steps that run dense."""
    dense_layers: Annotated[int, Bounds(ge=0)] = 0
    """First blocks that always run dense."""
    refresh_steps: tuple[Annotated[int, Bounds(ge=0)], ...] | Literal["placed"] | None = None
    """Steps that refresh, ascending, in place of the interval; the first step that is not dense always does. Stored as noise
    levels, so that generations with other numbers of steps refresh at the same places. `placed`: as many as by the interval,
    where the residual drifts most on the first calibration trajectories; that weighs all steps alike, and leaves less error of
    the attention, not always of the video, which early steps decide. null: by the interval."""
    calibrate: Literal["sparse", "corrected", "dense"] = "dense"
    """What distillation sees: dense attention, as in QuantSparse's Algorithm 1; the band alone; or the band and what it misses
    of the full-precision attention, as right after a refresh."""

    @property
    def calibrates_gain(self) -> bool:
        """Whether the gain of its residual is measured in calibration."""
        return self.density < 1 and self.residual.gain == "calibrated"

    @property
    def places_refreshes(self) -> bool:
        """Whether its refreshes lie where the measured residual drifts most."""
        return self.density < 1 and self.refresh_steps == "placed"

    @property
    def measures_residual(self) -> bool:
        """Whether the drift of its residual is measured in calibration."""
        return self.calibrates_gain or self.places_refreshes

    def __post_init__(self) -> None:
        if problems := self.impossible_values("attention.") or [*self.residual.problems(), *self._contradictions()]:
            raise ValueError("; ".join(problems))

    def _contradictions(self) -> list[str]:
        problems, steps = [], self.refresh_steps
        if steps is not None and self.residual.order == 0:
            problems.append(
                f"attention.refresh_steps is {steps!r}, but residual.order is 0: there is nothing to refresh; set it to 1 or "
                "2, or refresh_steps: null"
            )
        if isinstance(steps, tuple) and (not steps or list(steps) != sorted(set(steps))):
            problems.append(f"attention.refresh_steps is {list(steps)}; steps in ascending order, each once, or null")
        if self.measures_residual and self.head_kinds == "online":
            problems.append(
                f"attention.head_kinds is online, but residual.gain is {self.residual.gain!r} and refresh_steps {steps!r}: the "
                "residual is measured with each head's kind; set head_kinds: offline, or give gain and refresh_steps"
            )
        return problems
