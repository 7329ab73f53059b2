"""Settings that a loaded checkpoint may change, by their rules alone."""

from __future__ import annotations

from typing import Any

import pytest

from reelquant.attention.sparse_spec import SparseAttentionSpec, dense_threshold
from reelquant.noise_schedule import shifted_levels
from reelquant.runtime.knobs import KNOBS
from reelquant.runtime.knobs import changed as changed_by
from reelquant.settings.attention import Residual
from tests.errors import raises

LEVELS = shifted_levels(20, 5.0)
SPEC = SparseAttentionSpec(
    density=0.3,
    head_kinds={"a": "st"},
    dense_above=dense_threshold(2, LEVELS, refreshes=True),
    interval=4,
    residual=Residual(order=1, rank=8, gain=(0.9, 0.8)),
)


def changed(spec: SparseAttentionSpec, knobs: dict[str, Any]) -> SparseAttentionSpec:
    return changed_by(spec, knobs, schedule=lambda steps: shifted_levels(steps, 5.0), num_steps=20)


def kinds(spec: SparseAttentionSpec, kind: str) -> list[int]:
    return [step for step, found in enumerate(spec.schedule(LEVELS)) if found == kind]


def test_nothing_given_changes_nothing() -> None:
    assert changed(SPEC, {}) == changed(SPEC, dict.fromkeys(KNOBS)) == SPEC


def test_steps_are_those_of_the_schedule() -> None:
    assert (kinds(SPEC, "dense"), kinds(SPEC, "refresh")) == ([0], [1, 5, 9, 13, 17])
    later = changed(SPEC, {"dense_steps": 5, "interval": 8})
    assert (kinds(later, "dense"), kinds(later, "refresh")) == ([0, 1, 2, 3], [4, 12])
    without = changed(SPEC, {"dense_steps": 5, "residual": {"order": 0, "gain": None}})
    assert (kinds(without, "dense"), kinds(without, "refresh")) == ([0, 1, 2, 3, 4], [])
    placed = changed(SPEC, {"refresh_steps": [0, 2, 3, 11]})
    assert kinds(placed, "refresh") == [1, 2, 3, 11]
    assert changed(SPEC, {"refresh_at": placed.refresh_at}) == placed
    ways_back: tuple[dict[str, Any], ...] = ({"interval": 4}, {"refresh_steps": []})
    for back in ways_back:
        assert changed(placed, back) == SPEC
    assert kinds(changed(placed, {"density": 0.2}), "refresh") == [1, 2, 3, 11]


def test_fields_of_the_residual_are_changed_one_by_one() -> None:
    found = changed(SPEC, {"residual": {"storage": "low_rank_int8", "gain": [0.5]}}).residual
    assert found == Residual(order=1, rank=8, storage="low_rank_int8", gain=(0.5,))
    found = changed(SPEC, {"residual": {"order": 2, "extrapolation": "adjacent", "gain": None}}).residual
    assert found == Residual(order=2, rank=8, extrapolation="adjacent")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"colour": 1, "densty": None}, ["colour", "densty", "refresh_steps"]),
        ({"density": 0.0}, ["density", 0.0]),
        ({"density": "thin"}, ["density", "thin"]),
        ({"interval": 0, "precision": "int4"}, ["interval", 0, "precision", "int4"]),
        ({"dense_steps": 20}, ["dense_steps", 20, 19]),
        ({"dense_steps": 2.5}, ["dense_steps", 2.5]),
        ({"dense_steps": 1, "dense_above": 0.9}, ["dense_steps", "dense_above"]),
        ({"refresh_steps": [3, 3], "dense_steps": -1}, ["refresh_steps", [3, 3], "dense_steps", -1]),
        ({"refresh_steps": [20]}, ["refresh_steps", [20], 19]),
        ({"refresh_steps": 5}, ["refresh_steps", 5]),
        ({"refresh_steps": [4], "residual": {"order": 0, "gain": None}}, ["refresh_at", "residual.order", 0]),
        ({"residual": {"order": 2}}, ["residual.gain", "residual.order", 2]),
        ({"residual": {"rang": 3}}, ["residual.rang", "rank"]),
        ({"residual": 1}, ["residual", 1]),
        ({"residual": {"rank": "many"}}, ["many"]),
    ],
)
def test_what_cannot_be_is_refused_with_all_that_is_wrong(knobs: dict[str, Any], words: list[object]) -> None:
    with raises(ValueError, "sparse_attention", *words):
        changed(SPEC, knobs)
