"""Every study in configs/ can be planned as it stands, and still says what its record was made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import RunConfig
from pipeline.study.expansion import load_study
from pipeline.study.preparation import prepare_study
from tests.pipeline.small_run import ROOT

STUDIES = sorted(path for path in (ROOT / "configs" / "studies").glob("*.yaml") if path.name != "base.yaml")


SHARED_TRAJECTORIES = ("selection", "methods")
"""Studies whose settings are of other strategies, features or bits."""


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_is_feasible(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    prepared = prepare_study(study)
    assert prepared.problems == []
    if path.stem in SHARED_TRAJECTORIES:
        [count] = [count for count in prepared.counts if count.name == "trajectories"]
        num_seeds = len({run.config.seed for run in study.runs})
        assert (count.shared, count.at_most) == (num_seeds * study.runs[0].config.prompts.num_calibration, False)


RECORDED = {
    path.stem: record
    for path in STUDIES
    if (record := ROOT / "benchmarks" / "results" / f"study_{path.stem}.json").is_file()
}


def decisive(config: dict[str, Any]) -> dict[str, Any]:
    """What a setting's result depends on; where attention is dense, nothing else of it counts, nor the residual's change
    where there is none."""
    method, selection = dict(config["method"]), config["selection"]
    attention = dict(method.pop("attention"))
    if attention["density"] == 1:
        attention = {"density": 1, "precision": attention.get("precision", "full")}
    elif (order := attention["residual"]["order"]) < 2:
        kept = ("order", "rank", "storage") if order else ("order",)
        attention["residual"] = {key: attention["residual"][key] for key in kept}
    if method["lambda_min"] == 0.5 and method["attention_distillation"] == "none":
        method = {k: v for k, v in method.items() if k not in ("pool_size", "num_salient_tokens")}
    return {
        "method": method,
        "attention": attention,
        "selection": {key: selection[key] for key in ("strategy", "quantization_feature", "num_samples")},
        **{key: config[key] for key in ("bits", "generation", "prompts", "distillation")},
    }


def differences(now: dict[str, Any], then: dict[str, Any], path: str = "") -> list[str]:
    """Keys of `then` that are other now; a key that did not exist then has its default's effect."""
    found = []
    for key, value in then.items():
        here = f"{path}.{key}".lstrip(".")
        if isinstance(value, dict):
            found += differences(now.get(key, {}), value, here)
        elif now.get(key) != value:
            found.append(f"{here}: {now.get(key)!r}, recorded {value!r}")
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_settings_are_those_on_record(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recorded = json.loads(RECORDED[name].read_text())["configurations"]
    study = load_study(ROOT / "configs" / "studies" / f"{name}.yaml")
    configs: dict[str, RunConfig] = {}
    for run in study.runs:
        configs.setdefault(run.setting.name, run.config)
    assert recorded.keys() <= configs.keys()
    found = {
        setting: differences(decisive(configs[setting].model_dump(mode="json")), decisive(then))
        for setting, then in recorded.items()
    }
    assert {setting: problems for setting, problems in found.items() if problems} == {}
