"""`sparse_attention` of a checkpoint: everything that decides which attention runs at which step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from reelquant.attention.band_mask import mask_density
from reelquant.families.family import TokenLayout
from reelquant.noise_schedule import threshold_after
from reelquant.ops.band_attention.op import Precision

StepKind = Literal["dense", "refresh", "sparse"]
EXTRAPOLATIONS = ("constant", "linear")
STORAGES = ("full", "low_rank", "low_rank_int8")


@dataclass(frozen=True)
class ResidualSpec:
    """The residual cache (SSAR, QuantSparse §3.3)."""

    order: int = 2
    """0 for none, 1 or 2."""
    rank: int | None = 16
    """Of the projection; None for none."""
    extrapolation: str = "constant"
    """`constant` or `linear`."""
    storage: str = "low_rank"
    """`full` keeps whole residuals, `low_rank` factors of them, `low_rank_int8` factors with 8-bit rows."""

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
        return found


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
        if self.precision not in get_args(Precision):
            problems.append(f"precision is {self.precision!r}; one of {', '.join(get_args(Precision))}")
        for block, kinds in self.head_kinds.items():
            if not kinds or set(kinds) - {"s", "t"}:
                problems.append(f"head_kinds of {block} are {kinds!r}; one letter a head, s or t")
        if problems:
            raise ValueError("sparse_attention: " + "; ".join(problems))

    def kind_of_step(self, noise_level: float, num_below: int) -> StepKind:
        """Attention of a step in blocks that may run sparse.

        Args:
            noise_level: of the step.
            num_below: steps of the generation before this one that did not lie above `dense_above`.
        """
        if noise_level > self.dense_above:
            return "dense"
        return "refresh" if self.residual.order and num_below % self.interval == 0 else "sparse"

    def schedule(self, noise_levels: Sequence[float]) -> list[StepKind]:
        """Attention of every step of a generation with these noise levels, which fall."""
        num_above = sum(level > self.dense_above for level in noise_levels)
        return [self.kind_of_step(level, step - num_above) for step, level in enumerate(noise_levels)]

    def effective_density(
        self, layout: TokenLayout, width: int, *, noise_levels: Sequence[float], blocks: tuple[str, ...]
    ) -> float:
        """Mean share of the map over all steps and blocks; a dense step counts 1."""
        kinds = self.schedule(noise_levels)
        num_sparse = kinds.count("sparse") * sum(block not in self.dense_blocks for block in blocks)
        return 1 - num_sparse / (len(kinds) * len(blocks)) * (1 - mask_density(layout, width))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "dense_blocks": list(self.dense_blocks)}

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
                "head_kinds": dict(values.get("head_kinds", {})),
                "residual": ResidualSpec(**residual),
            }
        )
