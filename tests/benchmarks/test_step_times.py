"""Mean steps at full size: what was timed as a whole schedule comes out of its kinds of steps too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from benchmarks.dit_step.schedule import step_kinds
from benchmarks.step_times import attention_of, step_time
from reelquant.attention.sparse_spec import SparseAttentionSpec, dense_threshold
from reelquant.noise_schedule import shifted_levels
from reelquant.settings.attention import Residual

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks/results/dit_step.json").read_text())["results"]
RESIDUAL = {"order": 2, "rank": 16, "extrapolation": "linear"}


def attention(density: float = 0.15, dense_steps: int = 0, precision: str = "full", **more: Any) -> dict[str, Any]:
    knobs = {"density": density, "dense_steps": dense_steps, "precision": precision, "residual": RESIDUAL}
    return {"interval": 5, "dense_layers": 0, **knobs, **more}


@pytest.mark.parametrize(
    ("case", "knobs"),
    [
        ("ours 15 %", attention()),
        ("ours 15 %, 8-bit attention", attention(precision="int8_fp8")),
        ("ours 15 %, dense first 10 %", attention(dense_steps=5)),
        ("ours 25 %", attention(0.25)),
        ("ours 100 %, 8-bit attention", attention(precision="int8_fp8", enabled=False)),
    ],
)
def test_a_schedule_that_was_timed_is_composed_of_its_kinds(case: str, knobs: dict[str, Any]) -> None:
    found = step_time(knobs, RESULTS)
    assert found is not None
    assert found.seconds == pytest.approx(RESULTS[case]["mean_s"], rel=0.01)  # measured: 0.6 % at most
    assert found.peak_bytes == pytest.approx(RESULTS[case]["peak_bytes"], rel=0.001)


def test_what_was_not_timed_has_no_time() -> None:
    others = ({"density": 0.4}, {"residual": {**RESIDUAL, "order": 0}}, {"dense_layers": 2}, {"precision": "int8_16"})
    assert [step_time(attention(**other), RESULTS) for other in others] == [None] * 4


def test_a_step_is_of_the_kind_that_it_computes() -> None:
    levels = shifted_levels(50)

    def kinds(extrapolation: Literal["linear", "adjacent"], order: Literal[0, 1, 2]) -> list[str]:
        residual = Residual(order=order, rank=16 if order else None, extrapolation=extrapolation)
        threshold = dense_threshold(3, levels, refreshes=order > 0)
        return step_kinds(SparseAttentionSpec(0.2, dense_above=threshold, interval=3, residual=residual), 8)

    dense, first = ["dense"] * 2, ["first refresh", "first sparse", "first sparse"]
    assert kinds("linear", 2) == [*dense, *first, "refresh", "sparse", "sparse"]
    assert kinds("linear", 1) == [*dense, *first, *first]
    # Every dense step keeps its residual, the later of two neighbours compares.
    assert kinds("adjacent", 2) == ["first refresh", "refresh", "refresh", "sparse", "sparse", *first]
    assert kinds("linear", 0) == [*dense, "dense", *["bare sparse"] * 5]


def test_a_row_has_the_knobs_of_its_setting() -> None:
    own = attention(0.25)
    knobs = {"density": None, "interval": 9, "residual": {"order": 1, "rank": None}, "enabled": None}
    document = {
        "configurations": {
            "a": {"method": {"attention": own}, "evaluation": {"settings": {"thin": knobs}}},
            "b": {"method": {"attention": {**own, "density": 1.0}}, "evaluation": {"settings": {}}},
        }
    }
    assert attention_of(document, "a") == own
    assert attention_of(document, "a / thin") == {**own, "interval": 9, "residual": {**RESIDUAL, "order": 1}}
    assert [attention_of(document, name) for name in ("b", "noise floor")] == [None, None]
