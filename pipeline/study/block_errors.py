"""Errors of blocks as distillation left them, and how those of two settings differ.

A block's error is what its rounded form misses of the full-precision block's output, over all tokens of all calibration
samples (`BlockResult.loss_after`). Blocks' errors differ by orders of magnitude, so that each counts by its decibels, and
settings are compared block by block: the difference of one seed is the mean over its blocks, and the interval is that of the
seeds. Fewer decibels are better. Refinement and protected steps come after distillation and are not in it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.study.intervals import Interval, mean_interval


@dataclass(frozen=True)
class BlockErrors:
    """Of one run."""

    losses: Mapping[str, float]
    """By block, above zero."""
    basis: str
    """The same where they were measured on the same tokens in the same way; others are not comparable."""

    @property
    def decibels(self) -> dict[str, float]:
        """By block."""
        return {block: 10 * math.log10(loss) for block, loss in self.losses.items()}

    @property
    def mean_db(self) -> float:
        """Mean over the blocks."""
        return statistics.fmean(self.decibels.values())

    def difference_db(self, reference: BlockErrors) -> dict[str, float] | None:
        """To the reference by block; None where the two cannot be compared."""
        if self.basis != reference.basis or self.losses.keys() != reference.losses.keys():
            return None
        other = reference.decibels
        return {block: value - other[block] for block, value in self.decibels.items()}


def difference_interval(
    own: Mapping[int, BlockErrors], reference: Mapping[int, BlockErrors], *, kind: str | None = None
) -> Interval | None:
    """Mean over seeds of the mean difference of the blocks, with its 95 % interval over the seeds.

    Args:
        own: by seed; so is `reference`. Seeds that only one of them has, and those that cannot be compared, are left out.
        kind: count only blocks of this `block_kind`.
    """
    means = []
    for seed, errors in own.items():
        found = errors.difference_db(reference[seed]) if seed in reference else None
        values = [value for block, value in (found or {}).items() if kind in (None, block_kind(block))]
        if values:
            means.append(statistics.fmean(values))
    return mean_interval(means)


def block_kind(block: str) -> str:
    """The list of the model that a block is in, such as `single_transformer_blocks`."""
    return block.rpartition(".")[0]
