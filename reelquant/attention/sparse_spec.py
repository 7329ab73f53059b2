"""`sparse_attention` of a checkpoint: everything that decides which attention runs at which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Annotated, Literal

from reelquant.noise_schedule import threshold_after
from reelquant.settings.attention import BandAttention, SparseAttention
from reelquant.settings.declaration import Bounds
from reelquant.tokens import TokenLayout, mask_density

StepKind = Literal["dense", "refresh", "sparse"]


def refresh_thresholds(refresh_steps: Sequence[int], noise_levels: Sequence[float]) -> tuple[float, ...]:
    """`refresh_at` of a schedule that refreshes at these steps, ascending; step 0, which always does, has none."""
    return tuple(threshold_after(step, noise_levels) for step in refresh_steps if step > 0)


def dense_threshold(dense_steps: int, noise_levels: Sequence[float], *, refreshes: bool) -> float:
    """`dense_above` of a schedule whose first `dense_steps` run dense: the last of them is the refresh, where there is one."""
    return threshold_after(dense_steps - 1 if refreshes else dense_steps, noise_levels)


@dataclass(frozen=True)
class SparseAttentionSpec(BandAttention):
    """Sparse attention of one transformer."""

    ADDED = frozenset({"refresh_at", "dense_frames"})
    NEEDED = frozenset({"density"})
    SECTION = "sparse_attention"

    head_kinds: dict[str, str] = field(default_factory=dict)
    """By block: one letter a head, `s` spatial or `t` temporal. Empty where they are found while generating (`online`)."""
    online: bool = False
    """Find the head kinds while generating, at every refresh."""
    dense_above: Annotated[float, Bounds(ge=0, le=1)] = 1.0
    """Steps whose noise level lies above it run dense; the first step below it is a refresh (dense, too) where there is a
    residual. 1 for none."""
    dense_blocks: tuple[str, ...] = ()
    """Blocks that always run dense."""
    refresh_at: tuple[Annotated[float, Bounds(ge=0, le=1)], ...] = ()
    """Falling noise levels in place of `interval`: the first step that is not above one of them refreshes, as does the first
    one that is not above `dense_above`. Empty for refreshes by the interval."""

    dense_frames: Annotated[int, Bounds(ge=0)] = 0
    """First frames of the latents whose tokens see all and are seen by all, as text: an image's."""

    def __post_init__(self) -> None:
        if problems := self.impossible_values() or [*self.residual.problems(), *self._contradictions()]:
            raise ValueError(f"{self.SECTION}: " + "; ".join(problems))

    def _contradictions(self) -> list[str]:
        problems, levels = [], self.refresh_at
        if self.residual.gain == "calibrated":
            problems.append("residual.gain is calibrated; a list of factors, one a lag, or null")
        if any(before <= after for before, after in pairwise(levels)):
            problems.append(f"refresh_at is {list(levels)}; noise levels from 1 to 0, falling")
        if levels and not self.residual.order:
            problems.append("refresh_at says when the residual is refreshed, but residual.order is 0; set it to 1 or 2")
        for block, kinds in self.head_kinds.items():
            if not kinds or set(kinds) - {"s", "t"}:
                problems.append(f"head_kinds of {block} are {kinds!r}; one letter a head, s or t")
        return problems

    @classmethod
    def of(
        cls,
        attention: SparseAttention,
        *,
        noise_levels: Sequence[float],
        blocks: tuple[str, ...],
        dense_frames: int = 0,
    ) -> SparseAttentionSpec:
        """A method's attention on a model with these blocks, in model order; head kinds, and what of the residual is measured,
        are not there yet.

        Args:
            noise_levels: of the generation whose steps `attention` counts.
            dense_frames: of the model's layout.
        """
        shared = {f.name: getattr(attention, f.name) for f in fields(BandAttention)}
        residual, steps = attention.residual, attention.refresh_steps
        if residual.gain == "calibrated":
            shared["residual"] = replace(residual, gain=None)
        return cls(
            **shared,
            online=attention.head_kinds == "online",
            dense_above=dense_threshold(attention.dense_steps, noise_levels, refreshes=residual.order > 0),
            dense_blocks=blocks[: attention.dense_layers],
            refresh_at=refresh_thresholds(steps, noise_levels) if isinstance(steps, tuple) else (),
            dense_frames=dense_frames,
        )

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
