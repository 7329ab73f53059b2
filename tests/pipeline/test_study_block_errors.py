"""Block errors of settings against each other, from values small enough to check by hand."""

from __future__ import annotations

import math

import pytest

from pipeline.study.block_errors import BlockErrors, block_kind, difference_interval

REFERENCE = BlockErrors({"blocks.0": 1.0, "blocks.1": 1e-4, "single.0": 10.0}, "samples")
WORSE = BlockErrors({"blocks.0": 10.0, "blocks.1": 1e-3, "single.0": 10.0}, "samples")
BETTER = BlockErrors({"blocks.0": 0.1, "blocks.1": 1e-4, "single.0": 100.0}, "samples")


def test_every_block_counts_by_its_decibels() -> None:
    assert REFERENCE.decibels == pytest.approx({"blocks.0": 0.0, "blocks.1": -40.0, "single.0": 10.0})
    assert REFERENCE.mean_db == pytest.approx(-10.0)
    assert WORSE.difference_db(REFERENCE) == pytest.approx({"blocks.0": 10.0, "blocks.1": 10.0, "single.0": 0.0})


def test_the_interval_is_that_of_the_seeds() -> None:
    interval = difference_interval({0: WORSE, 1: BETTER, 7: WORSE}, {0: REFERENCE, 1: REFERENCE, 2: REFERENCE})
    # Seeds differ by 20/3 and 0: their standard error is 10/3.
    assert interval is not None
    assert interval.mean == pytest.approx(10 / 3)
    assert interval.num == 2
    assert interval.half_width == pytest.approx(math.tan(0.475 * math.pi) * 10 / 3)  # Cauchy's quantile
    single = difference_interval({0: BETTER}, {0: REFERENCE}, kind="single")
    assert single is not None
    assert single.mean == pytest.approx(10.0)
    assert single.half_width is None
    assert block_kind("single_transformer_blocks.12") == "single_transformer_blocks"


@pytest.mark.parametrize(
    "other",
    [
        BlockErrors(REFERENCE.losses, "other samples"),
        BlockErrors({"blocks.0": 1.0, "blocks.1": 1e-4}, "samples"),
        BlockErrors({**REFERENCE.losses, "single.1": 1.0}, "samples"),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(other: BlockErrors) -> None:
    assert other.difference_db(REFERENCE) is None
    assert difference_interval({0: other, 1: other}, {0: REFERENCE, 1: REFERENCE}) is None
