"""What ships is what our own results call better; the papers' settings stand apart, and fair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.loading import load_config
from pipeline.config.method import parse_method
from pipeline.study.expansion import load_study
from reelquant.settings.recipe import PRESETS, Recipe
from tests.pipeline.small_run import ROOT

CONFIGS = ROOT / "configs"
SHIPPED = sorted([*CONFIGS.glob("*.yaml"), CONFIGS / "studies" / "base.yaml"])
ABOUT_SELECTION = {"selection", "selection_finer", "features", "features_50"}
"""Studies that compare strategies."""
THE_PAPER_S_ROW = {
    "joint": {"quantsparse": "random"},
    "beyond": {"s2q as its paper gives it": "salience", "s2q by salience": "salience"},
}
"""Rows of other studies that are about a paper's samples."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_configurations_sample_uniformly(path: Path) -> None:
    assert load_config(path).selection.strategy == "uniform"


@pytest.mark.parametrize("path", sorted((CONFIGS / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_sample_uniformly_but_where_sampling_is_the_subject(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem == "base" or path.stem in ABOUT_SELECTION:
        return
    monkeypatch.chdir(ROOT)
    found = {run.setting.name: run.config.selection.strategy for run in load_study(path).runs}
    others = {name: strategy for name, strategy in found.items() if strategy != "uniform"}
    assert others == THE_PAPER_S_ROW.get(path.stem, {})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_configurations_calibrate_dense_and_extrapolate(path: Path) -> None:
    for method in load_config(path).methods:
        assert_not_worse(method)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"attention": {"density": 0.15}}])
def test_presets_take_no_row_that_measured_worse(preset: str, changes: dict[str, Any]) -> None:
    assert_not_worse(parse_method({"preset": preset, **changes}))


def assert_not_worse(method: Recipe) -> None:
    """Against the docs: calibration under the mask, and the residual's whole change added at once, are worse."""
    assert method.attention.calibrate == "dense"
    residual = method.attention.residual
    assert residual.order == 1 or residual.extrapolation == "linear"


def test_the_model_that_is_copied_by_newcomers_has_the_measured_preset() -> None:
    config = load_config(CONFIGS / "hunyuanvideo-13b.yaml")
    measured = next(
        run.config
        for run in load_study(CONFIGS / "studies" / "calibration.yaml").runs
        if run.setting.name == "reelquant W4A8"
    )
    assert config.method.preset == "reelquant"
    names = ("channel_scale", "rotation", "clip", "rounding", "weight_layout", "epochs", "token_weights", "lambda_min")
    assert {n: getattr(config.method, n) for n in names} == {n: getattr(measured.method, n) for n in names}
    steps = measured.generation.num_inference_steps
    assert config.method.num_protected_steps(steps) == measured.method.num_protected_steps(steps)
    assert config.selection == measured.selection
    assert config.bits == measured.bits


def test_the_papers_settings_are_fair() -> None:
    s2q = load_config(CONFIGS / "papers" / "s2q-vdit.yaml")
    assert (s2q.selection.strategy, s2q.selection.quantization_feature) == ("salience", "latent")
    assert (s2q.selection.num_samples, s2q.prompts.num_calibration) == (40, 10)
    assert (s2q.method.preset, s2q.method.epochs, s2q.method.lambda_min) == ("s2q", 15, 0.5)
    sparse = load_config(CONFIGS / "papers" / "quantsparse.yaml")
    assert (sparse.selection.strategy, sparse.selection.num_samples) == ("random", 20)
    assert (sparse.method.epochs, sparse.method.attention_distillation, sparse.method.rounding) == (
        15,
        "both",
        "nearest",
    )
    attention = sparse.method.attention
    assert (attention.calibrate, attention.dense_steps, attention.interval) == ("dense", 1, 5)
    assert (attention.residual.order, attention.residual.rank) == (1, 16)
    for config in (s2q, sparse):
        assert config.method.tokens_per_step == 1
        assert config.model == load_config(CONFIGS / "hunyuanvideo-13b.yaml").model
