"""Scores in dB from recorded errors, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.config.loading import parse_config
from pipeline.config.schema import RunConfig
from pipeline.study.quality_scores import decision_steps, recorded
from reelquant.calibration.block_rounding import EXACT_DB
from tests.errors import raises

ERRORS = [1e-2, 1e-3, 1e-3, 1e-4, 1e-2]
WEIGHTS = [0.5, 1.0, 2.0, 4.0, 0.0]
RESULTS: dict[str, dict[str, Any]] = {
    "full_precision-prompt-000": {"denoised_changes": [0.5, 0.06, 0.02, 0.01]},
    "full_precision-prompt-001": {"denoised_changes": [0.3, 0.05, 0.03, 0.03]},
    "step_weights": {"weights": WEIGHTS},
    "gptq-prompt-001": {"psnr_db": 30.0, "latent_error": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]},
    "gptq-velocity-000": {
        "prompts": {
            "prompt-000": {"velocity_error": ERRORS, "pass_errors": [[e, 2 * e] for e in ERRORS]},
            "prompt-001": {"velocity_error": [0.0] * 5},
        }
    },
}  # fmt: skip


def config(**evaluation: Any) -> RunConfig:
    values = {
        "run": "r", "model": "m", "prompts": {"calibration": "c", "held_out": "h", "num_held_out": 3},
        "generation": {"num_inference_steps": 5}, "method": "gptq",
        "evaluation": {"velocity_prompts": 2, "prompts_per_pass": 2, **evaluation},
    }  # fmt: skip
    return parse_config(values, "test")


def test_scores_are_weighed_errors_in_decibels() -> None:
    found = recorded(config(), RESULTS.get)
    assert found.decision_steps == 3, "the second change is 5.5 % in the mean"
    scores = found.scores("gptq")
    first, second = scores["prompt-000"], scores["prompt-001"]
    weighed = (0.5e-2 + 1e-3 + 2e-3 + 4e-4) / 7.5
    assert first["velocity_sqnr_db"] == pytest.approx(-10 * math.log10(weighed))
    assert first["pass_sqnr_db_0"] == pytest.approx(first["velocity_sqnr_db"])
    assert first["pass_sqnr_db_1"] == pytest.approx(first["velocity_sqnr_db"] - 10 * math.log10(2))
    # Two, one and two of five steps, weighed alike.
    assert first["velocity_sqnr_db_early"] == pytest.approx(-10 * math.log10((1e-2 + 1e-3) / 2))
    assert first["velocity_sqnr_db_middle"] == pytest.approx(30.0)
    assert first["velocity_sqnr_db_late"] == pytest.approx(-10 * math.log10((1e-4 + 1e-2) / 2))
    assert "early_commit_db" not in first, "its video is not made yet"
    assert second["velocity_sqnr_db"] == EXACT_DB
    assert second["early_commit_db"] == pytest.approx(40.0)


def test_what_is_not_recorded_yet_is_left_out() -> None:
    found = recorded(config(), {name: value for name, value in RESULTS.items() if name != "step_weights"}.get)
    assert "velocity_sqnr_db" not in found.scores("gptq")["prompt-000"]
    assert "velocity_sqnr_db_early" in found.scores("gptq")["prompt-000"]
    assert recorded(config(), lambda _: None).scores("gptq") == {}


def test_a_configured_decision_phase_counts() -> None:
    found = recorded(config(decision_steps=1), RESULTS.get)
    assert found.scores("gptq")["prompt-001"]["early_commit_db"] == pytest.approx(60.0)


def test_the_decision_phase_ends_with_the_last_large_change() -> None:
    assert decision_steps([[0.3, 0.01, 0.06, 0.01]]) == 4
    assert decision_steps([[0.01, 0.02]]) == 1
    assert decision_steps([[0.3, 0.2]]) == 3
    assert decision_steps([]) is None


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"velocity_prompts": 4}, ("evaluation.velocity_prompts", 4)),
        ({"videos": 4}, ("evaluation.videos", 4)),
        ({"weight_prompts": 3}, ("evaluation.weight_prompts", 3)),
        ({"weight_steps": 6}, ("evaluation.weight_steps", 6)),
        ({"decision_steps": 6}, ("evaluation.decision_steps", 6)),
        ({"weight_steps": 1}, ("evaluation.weight_steps", 1)),
    ],
)
def test_more_than_there_is_is_refused(evaluation: dict[str, Any], words: tuple[object, ...]) -> None:
    with raises(ValueError, *words):
        config(**evaluation)


@pytest.mark.parametrize(("num_held_out", "methods", "steps"), [(16, 1, 50), (16, 3, 16), (48, 2, 50), (7, 1, 30)])
def test_by_default_the_metric_takes_15_percent_of_the_forward_passes(
    num_held_out: int, methods: int, steps: int
) -> None:
    compare = [{"preset": "rtn", "name": f"rtn-{index}"} for index in range(methods - 1)]
    values = {
        "run": "r", "model": "m", "prompts": {"calibration": "c", "held_out": "h", "num_held_out": num_held_out},
        "generation": {"num_inference_steps": steps}, "method": "gptq", "compare": compare,
    }  # fmt: skip
    found = parse_config(values, "test")
    generations = num_held_out * (1 + methods)
    # A perturbed step takes a forward pass, and half a generation on average.
    metric = found.num_velocity_prompts * methods + found.num_weight_steps * (0.5 + 1 / steps)
    assert metric <= 0.15 * generations + (0.5 if num_held_out > 7 else 1.0)
    assert found.num_velocity_prompts >= 1
    assert 2 <= found.num_weight_steps <= steps
