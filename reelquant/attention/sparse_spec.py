"""`sparse_attention` of a checkpoint: everything that decides which attention runs at which step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, get_args

from reelquant.noise_schedule import threshold_after
from reelquant.ops.band_attention.op import Precision
from reelquant.tokens import TokenLayout, mask_density

StepKind = Literal["dense", "refresh", "sparse"]
EXTRAPOLATIONS = ("constant", "linear", "adjacent")
LARGEST_GAIN = 2.0
STORAGES = ("full", "low_rank", "low_rank_int8")


@dataclass(frozen=True)
class ResidualSpec:
    """The residual cache (SSAR, QuantSparse §3.3)."""

    order: int = 2
    """0 for none, 1 or 2."""
    rank: int | None = 16
    """Of the projection; None for none."""
    extrapolation: str = "constant"
    """`constant`, `linear` or `adjacent`."""
    storage: str = "low_rank"
    """`full` keeps whole residuals, `low_rank` factors of them, `low_rank_int8` factors with 8-bit rows."""
    gain: tuple[float, ...] | None = None
    """With order 1: factors on the residual at 1, 2, ... steps after its refresh; the last one counts for all later steps.
    None for 1 everywhere."""

    @property
    def compares_adjacent_steps(self) -> bool:
        """Whether a step's residual is of use to the step after it, so that dense steps keep theirs."""
        return self.order == 2 and self.extrapolation == "adjacent"

    def gain_at(self, lag: int) -> float:
        """Factor on the residual `lag` steps after its refresh."""
        return 1.0 if self.gain is None or lag < 1 else self.gain[min(lag, len(self.gain)) - 1]

    def problems(self, head_dim: int | None = None) -> list[str]:
        """Everything that is impossible."""
        found = []
        if self.order not in (0, 1, 2):
            found.append(f"residual.order is {self.order}; 0 (none), 1 or 2")
        if self.rank is not None and self.rank < 1:
            found.append(f"residual.rank is {self.rank}; 1 or more, or none for no projection")
        if self.rank is not None and head_dim is not None and self.rank > head_dim:
            found.append(f"residual.rank is {self.rank}, above the head size {head_dim}; at most {head_dim}, or none")
        if self.extrapolation not in EXTRAPOLATIONS:
            found.append(f"residual.extrapolation is {self.extrapolation!r}; one of {', '.join(EXTRAPOLATIONS)}")
        if self.storage not in STORAGES:
            found.append(f"residual.storage is {self.storage!r}; one of {', '.join(STORAGES)}")
        if self.storage != "full" and self.rank is None and self.order > 0:
            found.append(f"residual.storage {self.storage} needs a rank; set residual.rank, or storage full")
        return found + self._gain_problems()

    def _gain_problems(self) -> list[str]:
        if self.gain is None:
            return []
        if not self.gain or not all(isinstance(g, int | float) and 0 <= g <= LARGEST_GAIN for g in self.gain):
            return [f"residual.gain is {self.gain!r}; factors from 0 to {LARGEST_GAIN:g}, one a lag, or none"]
        if self.order != 1:
            return [
                f"residual.gain damps a residual of order 1, but residual.order is {self.order}; set order 1, or no gain"
            ]
        return []

    def to_dict(self) -> dict[str, Any]:
        """JSON values; without a gain as before there was one."""
        values = asdict(self)
        gain = values.pop("gain")
        return values if gain is None else {**values, "gain": list(gain)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ResidualSpec:
        """From the JSON values of `to_dict`.

        Raises:
            ValueError: a key is unknown, or `gain` is no list.
        """
        gain = values.get("gain")
        problems = [f"unknown key residual.{key}" for key in sorted(set(values) - {f.name for f in fields(cls)})]
        if not (gain is None or isinstance(gain, list | tuple)):
            problems.append(f"residual.gain is {gain!r}; a list of factors, one a lag, or null")
        if problems:
            raise ValueError("sparse_attention: " + "; ".join(problems))
        return cls(**{**values, "gain": None if gain is None else tuple(gain)})


def refresh_thresholds(refresh_steps: Sequence[int], noise_levels: Sequence[float]) -> tuple[float, ...]:
    """`refresh_at` of a schedule that refreshes at these steps, ascending; step 0, which always does, has none."""
    return tuple(threshold_after(step, noise_levels) for step in refresh_steps if step > 0)


def dense_threshold(dense_steps: int, noise_levels: Sequence[float], *, refreshes: bool) -> float:
    """`dense_above` of a schedule whose first `dense_steps` run dense: the last of them is the refresh, where there is one."""
    return threshold_after(dense_steps - 1 if refreshes else dense_steps, noise_levels)


@dataclass(frozen=True)
class SparseAttentionSpec:
    """Sparse attention of one transformer."""

    density: float
    """Target share of the `L x L` map that a sparse step visits, in (0, 1]; the widest band that stays below is taken."""
    head_kinds: dict[str, str] = field(default_factory=dict)
    """By block: one letter a head, `s` spatial or `t` temporal. Empty where they are found while generating (`online`)."""
    online: bool = False
    """Find the head kinds while generating, at every refresh."""
    dense_above: float = 1.0
    """Steps whose noise level lies above it run dense; the first step below it is a refresh (dense, too) where there is a
    residual. 1 for none."""
    dense_blocks: tuple[str, ...] = ()
    """Blocks that always run dense."""
    interval: int = 5
    """Steps from one refresh of the residual to the next; refreshes run dense."""
    refresh_at: tuple[float, ...] = ()
    """Falling noise levels in place of `interval`: the first step that is not above one of them refreshes, as does the first
    one that is not above `dense_above`. Empty for refreshes by the interval."""
    residual: ResidualSpec = field(default_factory=ResidualSpec)
    precision: Precision = "full"
    """Of all attention products, dense ones too: see `ops/eight_bit_attention/op.py`."""

    def __post_init__(self) -> None:
        problems = self.residual.problems()
        if not 0 < self.density <= 1:
            problems.append(f"density is {self.density}; above 0 and at most 1")
        if self.interval < 1:
            problems.append(f"interval is {self.interval}; at least 1 step (1 is always dense)")
        if not 0 <= self.dense_above <= 1:
            problems.append(f"dense_above is {self.dense_above}; a noise level from 0 to 1")
        if not all(0 <= level <= 1 for level in self.refresh_at) or any(
            before <= after for before, after in pairwise(self.refresh_at)
        ):
            problems.append(f"refresh_at is {list(self.refresh_at)}; noise levels from 1 to 0, falling")
        if self.refresh_at and not self.residual.order:
            problems.append("refresh_at says when the residual is refreshed, but residual.order is 0; set it to 1 or 2")
        if self.precision not in get_args(Precision):
            problems.append(f"precision is {self.precision!r}; one of {', '.join(get_args(Precision))}")
        for block, kinds in self.head_kinds.items():
            if not kinds or set(kinds) - {"s", "t"}:
                problems.append(f"head_kinds of {block} are {kinds!r}; one letter a head, s or t")
        if problems:
            raise ValueError("sparse_attention: " + "; ".join(problems))

    def kind_of_step(self, noise_level: float, num_below: int, before: float | None = None) -> StepKind:
        """Attention of a step in blocks that may run sparse. A refresh is dense and keeps its residual, which of the steps
        above `dense_above` only those do that the step after them is compared with (`extrapolation` adjacent).

        Args:
            noise_level: of the step.
            num_below: steps of the generation before this one that did not lie above `dense_above`.
            before: noise level of the step before; None for the first.
        """
        if noise_level > self.dense_above:
            return "refresh" if self.residual.compares_adjacent_steps else "dense"
        if not self.residual.order:
            return "sparse"
        if not self.refresh_at:
            return "refresh" if num_below % self.interval == 0 else "sparse"
        crosses = before is None or any(noise_level <= level < before for level in self.refresh_at)
        return "refresh" if crosses or num_below == 0 else "sparse"

    def schedule(self, noise_levels: Sequence[float]) -> list[StepKind]:
        """Attention of every step of a generation with these noise levels, which fall."""
        num_above = sum(level > self.dense_above for level in noise_levels)
        before = [None, *noise_levels[:-1]]
        steps = enumerate(zip(noise_levels, before, strict=True))
        return [self.kind_of_step(level, step - num_above, last) for step, (level, last) in steps]

    def effective_density(
        self, layout: TokenLayout, width: int, *, noise_levels: Sequence[float], blocks: tuple[str, ...]
    ) -> float:
        """Mean share of the map over all steps and blocks; a dense step counts 1."""
        kinds = self.schedule(noise_levels)
        num_sparse = kinds.count("sparse") * sum(block not in self.dense_blocks for block in blocks)
        return 1 - num_sparse / (len(kinds) * len(blocks)) * (1 - mask_density(layout, width))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; without `refresh_at` as before there was one."""
        values = {**asdict(self), "dense_blocks": list(self.dense_blocks), "residual": self.residual.to_dict()}
        thresholds = values.pop("refresh_at")
        return {**values, "refresh_at": list(thresholds)} if thresholds else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseAttentionSpec:
        """From the JSON values of `to_dict`.

        Raises:
            ValueError: a key is unknown or missing, or a value is not possible.
        """
        known, residual_known = {f.name for f in fields(cls)}, {f.name for f in fields(ResidualSpec)}
        residual = values.get("residual", {})
        if not isinstance(residual, Mapping) or not isinstance(values.get("head_kinds", {}), Mapping):
            raise ValueError(f"sparse_attention: residual and head_kinds must be objects, got {values!r}")
        unknown = sorted(set(values) - known) + sorted(f"residual.{key}" for key in set(residual) - residual_known)
        problems = [f"unknown keys {', '.join(unknown)}"] if unknown else []
        if problems := problems + ["density is missing"] * ("density" not in values):
            raise ValueError(f"sparse_attention: {'; '.join(problems)}")
        return cls(
            **{
                **values,
                "dense_blocks": tuple(values.get("dense_blocks", ())),
                "refresh_at": tuple(values.get("refresh_at", ())),
                "head_kinds": dict(values.get("head_kinds", {})),
                "residual": ResidualSpec.from_dict(residual),
            }
        )
