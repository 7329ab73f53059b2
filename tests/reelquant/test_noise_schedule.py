"""First steps as noise levels: the same steps under any scheduler, rounded or not."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch

from reelquant.families.hunyuan_video import FAMILY
from reelquant.noise_schedule import shifted_levels, threshold_after
from reelquant.runtime.pipeline_schedule import PipelineSchedule
from tests.errors import raises

MODEL = Path(__file__).parents[2] / "assets" / "hunyuanvideo-digits"


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [1, 4, 16, 50])
def test_a_threshold_separates_the_first_steps(steps: int, shift: float) -> None:
    levels = shifted_levels(steps, shift)
    for first in range(steps + 2):
        threshold = threshold_after(first, levels)
        assert 0 <= threshold <= 1
        assert [level > threshold for level in levels] == [step < first for step in range(steps)]


def test_rounded_timesteps_fall_on_the_same_side_where_rounding_leaves_them_apart() -> None:
    levels = shifted_levels(50)
    rounded = (torch.tensor(levels) * 1000).bfloat16().double() / 1000
    for first in range(1, 50):
        if rounded[first - 1] > rounded[first]:
            threshold = threshold_after(first, levels)
            assert rounded[first - 1] > threshold >= rounded[first]


def test_a_pipelines_levels_are_its_schedulers(tmp_path: Path) -> None:
    assert PipelineSchedule(MODEL, FAMILY)(16) == pytest.approx(shifted_levels(16, 3.0), abs=1e-6)
    config = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 7.0}
    config |= {"prediction_type": "flow_prediction", "num_train_timesteps": 1000}
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config))
    levels = PipelineSchedule(tmp_path, FAMILY)(10)
    assert len(levels) == 10
    assert levels == sorted(levels, reverse=True)
    path.write_text(json.dumps({"_class_name": "os"}))
    with raises(ValueError, "scheduler_config.json", "os"):
        PipelineSchedule(tmp_path, FAMILY)(10)


def test_without_a_scheduler_it_is_flow_matchings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert PipelineSchedule(tmp_path, FAMILY)(5) == shifted_levels(5)
    assert "scheduler_config.json" in caplog.text


def test_sigmas_are_known_of_euler_s_sampler_alone(tmp_path: Path) -> None:
    sigmas = PipelineSchedule(MODEL, FAMILY).sigmas(16)
    assert sigmas == pytest.approx([*shifted_levels(16, 3.0), 0.0], abs=1e-6)
    with raises(ValueError, "scheduler_config.json"):
        PipelineSchedule(tmp_path, FAMILY).sigmas(16)
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    for config in (
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True},
    ):
        path.write_text(json.dumps(config))
        with raises(ValueError, config["_class_name"], "FlowMatchEulerDiscreteScheduler", "stochastic_sampling"):
            PipelineSchedule(tmp_path, FAMILY).sigmas(16)


def test_a_schedule_is_copied_and_pickled_with_its_transformer() -> None:
    schedule = PipelineSchedule(MODEL, FAMILY)
    pickled = pickle.loads(pickle.dumps(schedule))  # noqa: S301 - made here
    assert copy.deepcopy(schedule)(7) == pickled(7) == schedule(7)
