"""Estimators on made data: against simulations with fixed seeds, tables of the literature, and definitions spelled out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np
import pytest

from pipeline.study.estimators import (
    crossed_interval,
    crossed_mean,
    crossed_share,
    hodges_lehmann,
    mcnemar,
    valley,
    wilson_interval,
)
from pipeline.study.intervals import mean_interval

GENERATOR = np.random.default_rng


def table(seed: int, *, c: float, v: float, rest: float, shape: tuple[int, int] = (5, 16)) -> np.ndarray:
    """`[calibrations, videos]` with these standard deviations, mean 1."""
    draw = GENERATOR(seed).standard_normal
    return 1 + c * draw((shape[0], 1)) + v * draw((1, shape[1])) + rest * draw(shape)


@pytest.mark.parametrize(
    ("c", "v", "rest"), [(0.3, 0.25, 0.1), (0.0, 0.3, 0.3), (0.3, 0.0, 0.3), (0.0, 0.0, 1.0), (0.1, 0.5, 0.1)]
)
def test_the_crossed_interval_covers_the_mean_as_often_as_it_says(c: float, v: float, rest: float) -> None:
    num = 1500
    found = [crossed_mean(table(seed, c=c, v=v, rest=rest)) for seed in range(num)]
    covered = sum(abs(interval.mean - 1) <= (interval.half_width or 0.0) for interval in found) / num
    assert 0.93 <= covered <= 0.995
    # Videos x calibrations taken as independent cover far less where either factor matters.
    if c:
        naive = [mean_interval(list(table(seed, c=c, v=v, rest=rest).ravel())) for seed in range(num)]
        assert sum(abs(i.mean - 1) <= (i.half_width or 0.0) for i in naive if i is not None) / num < covered - 0.1


def test_the_crossed_interval_has_the_variance_of_the_formula() -> None:
    c, v, rest, num = 0.3, 0.5, 0.2, 4000
    means = [crossed_mean(table(seed, c=c, v=v, rest=rest)).mean for seed in range(num)]
    assert np.var(means) == pytest.approx(v**2 / 16 + c**2 / 5 + rest**2 / 80, rel=0.06)


def test_one_calibration_or_one_video_is_an_ordinary_interval() -> None:
    values = {"a": 1.0, "b": 2.5, "c": 2.0}
    expected = mean_interval(list(values.values()))
    assert expected is not None
    assert expected.half_width is not None
    by_seed = {seed: {"p": x} for seed, x in enumerate(values.values())}
    for crossed in (crossed_interval({0: values}), crossed_interval(by_seed)):
        assert crossed is not None
        assert crossed.mean == pytest.approx(expected.mean)
        assert crossed.half_width == pytest.approx(expected.half_width)


@pytest.mark.parametrize("num", [2, 3, 7, 23, 48])
def test_no_degree_of_freedom_is_lost_to_rounding(num: int) -> None:
    for seed in range(20):
        values = GENERATOR(seed).normal(30.0, 5.0, num)
        expected, crossed = mean_interval(list(values)), crossed_mean(values[None, :])
        assert expected is not None
        assert crossed.half_width == pytest.approx(expected.half_width, rel=1e-9)


def test_videos_that_a_calibration_lacks_are_left_out() -> None:
    found = crossed_interval({0: {"a": 1.0, "b": 2.0, "c": 9.0}, 1: {"b": 4.0, "a": 3.0}, 2: {}})
    assert found is not None
    assert (found.mean, found.num) == (2.5, 4)
    assert crossed_interval({0: {"a": 1.0}, 1: {"b": 1.0}}) is None
    assert crossed_interval({}) is None
    single = crossed_interval({0: {"a": 3.0}})
    assert single is not None
    assert (single.mean, single.half_width) == (3.0, None)


def test_hodges_lehmann_is_the_median_of_all_pair_averages_and_inverts_the_signed_rank_test() -> None:
    values = GENERATOR(3).normal(1.0, 2.0, 11)
    found = hodges_lehmann(list(values))
    assert found is not None
    pairs = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2))
    assert found.value == pytest.approx(np.median(pairs))
    # Wilcoxon's table: for n = 11 and 95 % the critical value is 10, so the 11th from either end.
    assert [found.low, found.high] == pytest.approx([pairs[10], pairs[-11]])


@pytest.mark.parametrize(("num", "critical"), [(6, 0), (8, 3), (16, 29), (25, 89), (50, 434)])
def test_hodges_lehmann_has_the_tabulated_critical_values(num: int, critical: int) -> None:
    values = [float(2**i) if num < 20 else float(i * i + i / 7) for i in range(num)]
    found = hodges_lehmann(values)
    pairs = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2))
    assert found is not None
    assert (found.low, found.high) == (pairs[critical], pairs[-1 - critical])


def test_hodges_lehmann_stays_where_a_few_videos_fork_and_says_nothing_of_five() -> None:
    values = list(GENERATOR(0).normal(0.5, 0.3, 40))
    forked = [*values[:37], -20.0, -22.0, -18.0]
    found = hodges_lehmann(forked)
    assert found is not None
    assert found.value == pytest.approx(0.5, abs=0.15)
    assert found.low is not None
    assert found.low > 0
    assert np.mean(forked) < -0.9
    few = hodges_lehmann([1.0, 2.0, 3.0, 4.0, 5.0])
    assert few is not None
    assert (few.value, few.low, few.high) == (3.0, None, None)
    assert hodges_lehmann([]) is None


def test_hodges_lehmann_of_many_differences_covers_as_often() -> None:
    found = [hodges_lehmann(list(GENERATOR(seed).standard_t(3, 210))) for seed in range(200)]
    assert (
        0.9 <= np.mean([e.low <= 0 <= e.high for e in found if e and e.low is not None and e.high is not None]) <= 0.99
    )


def test_wilson_has_the_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, num, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        found = wilson_interval(hits, num)
        assert found is not None
        assert (found.value, found.low, found.high) == pytest.approx((hits / num, low, high), abs=5e-5)
    assert wilson_interval(0, 0) is None


def pairs(table: Sequence[Sequence[object]] | np.ndarray) -> dict[int, dict[str, bool]]:
    """Of a table `[calibrations, videos]`."""
    return {seed: {f"prompt-{i:03d}": bool(value) for i, value in enumerate(row)} for seed, row in enumerate(table)}


@pytest.mark.parametrize("forked", [(0, 1, 0, 0, 1, 0, 0), (0, 0, 0), (1, 1, 1, 1), (1,)])
@pytest.mark.parametrize("num", [2, 5])
def test_calibrations_that_are_one_tell_of_forks_what_one_does(forked: tuple[int, ...], num: int) -> None:
    one, same = crossed_share(pairs([forked])), crossed_share(pairs([forked] * num))
    assert one is not None
    assert one == wilson_interval(sum(forked), len(forked))
    if len(forked) > 1:  # a single video is as many as there are calibrations
        assert same is not None
        assert (same.value, same.low, same.high) == pytest.approx((one.value, one.low, one.high))
        assert same.num == num * one.num
    other = [not any(forked[:1]), *forked[1:]]
    p = mcnemar(pairs([forked]), pairs([other]))
    assert p is not None
    assert mcnemar(pairs([forked] * num), pairs([other] * num)) == p


def test_the_share_of_forks_has_the_design_effect_of_the_components() -> None:
    # MS_v = 11/24, MS_c = MS_vc = 1/8: s_v² = 1/6, s_c² = 0, s_vc² = 1/8; (2/6 + 1/8) / (1/6 + 1/8) = 11/7.
    found, expected = crossed_share(pairs([[1, 1, 0, 0], [1, 0, 0, 0]])), wilson_interval(3 / 8 * 56 / 11, 56 / 11)
    assert found is not None
    assert expected is not None
    assert (found.value, found.low, found.high) == pytest.approx((3 / 8, expected.low, expected.high))
    assert found.num == 8
    # In a Latin square neither factor matters: 16 independent pairs. Exchanged, the factors have the same effect.
    square, plain = crossed_share(pairs(np.eye(4))), wilson_interval(4, 16)
    assert square is not None
    assert square == plain
    table = GENERATOR(2).random((5, 7)) < [[0.1, 0.9, 0.2, 0.3, 0.8, 0.1, 0.5]]
    first, second = crossed_share(pairs(table)), crossed_share(pairs(table.T))
    assert first is not None
    assert second is not None
    assert (first.low, first.high) == pytest.approx((second.low, second.high))
    assert crossed_share({0: {"a": True}, 1: {"b": True}}) is None
    lacking = crossed_share({0: {"a": True, "b": False, "c": True}, 1: {"b": False, "a": True}, 2: {}})
    assert lacking is not None
    assert (lacking.value, lacking.num) == (0.5, 4)


@pytest.mark.parametrize("shape", [(5, 8), (3, 16)])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_the_share_of_forks_covers_as_often_as_it_says_where_videos_differ(
    share: float, shape: tuple[int, int]
) -> None:
    num, covered, naive = 300, 0, 0
    for seed in range(num):
        below = table(seed, c=0, v=1, rest=0.5, shape=shape) < 1 + 1.25**0.5 * NormalDist().inv_cdf(share)
        found, independent = crossed_share(pairs(below)), wilson_interval(int(below.sum()), below.size)
        assert found is not None
        assert independent is not None
        covered += (found.low or 0.0) <= share <= (found.high or 0.0)
        naive += (independent.low or 0.0) <= share <= (independent.high or 0.0)
    assert covered >= 0.85 * num
    assert naive < covered - 0.05 * num


def test_mcnemar_of_one_calibration_is_a_binomial_test_of_the_discordant_videos() -> None:
    both, neither = [1] * 4, [0] * 20
    first, second = [*both, *neither, 1, 1, 1, 1, 1], [*both, *neither, *[0] * 5]
    assert mcnemar(pairs([first]), pairs([second])) == pytest.approx(2 / 32)
    assert mcnemar(pairs([[*[1] * 5, 0]]), pairs([[*[0] * 5, 1]])) == pytest.approx(2 * 7 / 64)
    assert mcnemar(pairs([both]), pairs([both])) == 1.0
    assert mcnemar(pairs([both]), {1: pairs([both])[0]}) is None
    assert mcnemar({}, pairs([both])) is None


@pytest.mark.parametrize("seed", range(4))
def test_mcnemar_counts_every_exchange_of_the_two_settings_in_a_video(seed: int) -> None:
    draw = GENERATOR(seed).random
    first, second = (draw((3, 1 + 9)) < share for share in (0.5, 0.2))
    apart = (first.astype(int) - second).sum(axis=0)
    sums = [abs(sum(sign * x for sign, x in zip(signs, apart, strict=True))) for signs in signs_of(len(apart))]
    assert mcnemar(pairs(first), pairs(second)) == pytest.approx(np.mean([total >= abs(apart.sum()) for total in sums]))


def signs_of(num: int) -> Iterator[tuple[int, ...]]:
    return itertools.product((-1, 1), repeat=num)


@pytest.mark.parametrize("num_forks", [4, 12, 60])
def test_the_valley_lies_between_two_modes(num_forks: int) -> None:
    draw = GENERATOR(num_forks).normal
    values = [*draw(21.0, 1.5, num_forks), *draw(40.0, 4.0, 100)]
    threshold = valley(values)
    assert threshold is not None
    assert 24 < threshold < 31


def test_one_mode_has_no_valley() -> None:
    draws = [GENERATOR(seed).normal(38.0, 5.0, 48) for seed in range(100)]
    assert sum(valley(list(draw)) is not None for draw in draws) <= 3
    assert valley([30.0] * 20) is None
    assert valley([20.0, 40.0]) is None
    assert valley([]) is None
