"""A whole run with sparse attention: head kinds are found, stored, and run by plain `from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.loading import ConfigError, load_config
from pipeline.plan import plan_config
from tests.errors import names, raises
from tests.pipeline.small_run import Recorded, call, small_run

METHOD: dict[str, Any] = {
    "preset": "s2q_quantsparse", "rotation_block": 64, "epochs": 1, "attention_distillation": "both",
    "pool_size": 16, "num_salient_tokens": 16, "protected_steps": 1,
    "attention": {
        "density": 0.4, "interval": 2, "dense_steps": 0, "dense_layers": 1, "calibrate": "corrected",
        "residual": {"rank": 8, "order": 1, "gain": "calibrated"}, "refresh_steps": "placed", "precision": "int8_16",
    },
}  # fmt: skip
BITS = {"weight": 4, "activation": 6}
BLOCKS = [f"transformer_blocks.{i}" for i in range(3)] + [f"single_transformer_blocks.{i}" for i in range(6)]


@pytest.mark.ray
def test_a_sparse_run_from_trajectories_to_a_checkpoint_that_runs_sparse(tmp_path: Path) -> None:
    evaluation = {"settings": {"wide": {"density": 0.6}}}
    done = call("run", str(small_run(tmp_path, method=METHOD, bits=BITS, evaluation=evaluation)))
    assert done.returncode == 0, done.stdout + done.stderr
    recorded = Recorded(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint"
    stored = json.loads((checkpoint / "transformer" / "config.json").read_text())["quantization_config"]
    # Of the three steps the first is protected: the noise levels are 1, 0.857 and 0.6.
    assert stored["step_protection"] == {"noise_above": pytest.approx(0.93, abs=0.07), "activation_bits": 8}
    sparse = stored["sparse_attention"]
    assert sparse["dense_blocks"] == BLOCKS[:1]
    assert set(sparse["head_kinds"]) == set(BLOCKS[1:])
    assert all(len(kinds) == 3 and set(kinds) <= {"s", "t"} for kinds in sparse["head_kinds"].values())
    assert (sparse["interval"], sparse["residual"]["rank"], sparse["precision"]) == (2, 8, "int8_16")
    for model, density in (("s2q_quantsparse", 0.4), ("wide", 0.6)):
        video, forced = (recorded.read("evaluation", f"{model}-{unit}") for unit in ("prompt-000", "velocity-000"))
        assert video is not None
        assert forced is not None
        # One block of nine dense; of three steps two are refreshes, as by the interval.
        expected = pytest.approx((9 + 1 + 8 * density + 9) / 27, abs=0.01)
        assert video.result["effective_density"] == forced.result["effective_density"] == expected
        assert video.result["psnr_db"] > 15
        assert all(0 < error < 0.1 for error in forced.result["prompts"]["prompt-000"]["velocity_error"])
    for segment in recorded.records("distillation"):
        for block in segment.result["blocks"].values():
            assert set(block["attention_losses"]) == {"global", "local"}
    report = (tmp_path / "run" / "report.html").read_text()
    assert "s2q_quantsparse" in report
    assert "s2q_quantsparse, other settings" in report
    [refined] = recorded.records("refinement")
    measured = refined.result["residual"]
    assert measured["refresh_steps"] in ([0, 1], [0, 2])
    assert (sparse["refresh_at"], sparse["residual"]["gain"]) == (measured["refresh_at"], measured["gain"])
    assert len(measured["gain"]) == 2
    assert f"refreshes at steps {', '.join(map(str, measured['refresh_steps']))}" in report
    verified = call("verify", str(checkpoint))
    assert verified.returncode == 0, verified.stdout


def problems(tmp_path: Path, **attention: Any) -> str:
    path = small_run(tmp_path, method={**METHOD, "attention": {**METHOD["attention"], **attention}}, bits=BITS)
    with pytest.raises(ConfigError) as error:
        plan_config(load_config(path)).require_feasible()
    return "; ".join(error.value.problems)


def test_what_the_model_or_the_schedule_cannot_have_is_said_before_the_run(tmp_path: Path) -> None:
    assert names(problems(tmp_path, residual={"rank": 65}), "residual.rank", 65, 64)
    assert names(problems(tmp_path, dense_steps=3), "dense_steps", 3)
    assert names(problems(tmp_path, refresh_steps=[1, 3]), "refresh_steps", "(1, 3)", 2)
    assert names(problems(tmp_path, dense_layers=9), "dense_layers", 9)
    assert names(problems(tmp_path, density=0.02), "density", 0.02)
    thin = small_run(tmp_path, method=METHOD, bits=BITS, evaluation={"settings": {"thin": {"density": 0.02}}})
    with raises(ConfigError, "evaluation.settings.thin.density", 0.02):
        plan_config(load_config(thin)).require_feasible()
