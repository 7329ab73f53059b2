"""What `init` takes for a model's defaults, against calls of the real pipelines that name no size."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from pipeline.default_generation import SizeSteps, default_generation, size_steps
from reelquant.settings.generation import Generation
from tests.errors import names
from tests.pipeline.small_run import ROOT
from tests.pipeline.test_prompts import image
from tests.reelquant.families import tiny_pipelines
from tests.reelquant.families.tiny_models import TINY as TINY_MODELS
from workers.component_check import pipeline_inputs
from workers.images import read_image

TINY = [
    name
    for name, made in vars(tiny_pipelines).items()
    if inspect.isfunction(made) and made.__module__ == tiny_pipelines.__name__ and not name.startswith("_")
]
"""Of every pipeline that a run takes, by the function that makes it."""


class _Called(Exception):
    """Ends a pipeline's call once its size is known."""


def sizes_in_a_call(folder: Path) -> dict[str, int]:
    """Height, width, frames, guidance and text tokens of a call of the real pipeline that names none of them."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {}
    prepare = type(pipeline).prepare_latents

    def prepare_latents(*arguments: Any, **named: Any) -> None:
        found.update(inspect.signature(prepare).bind(pipeline, *arguments, **named).arguments)
        raise _Called

    pipeline.prepare_latents = prepare_latents
    shown = {"image": read_image(image(folder / "i.png", (1280, 720)).read_bytes())}
    with pytest.raises(_Called):
        pipeline(prompt="the digit 3", **(shown if pipeline_inputs(folder).image == "needed" else {}))
    sizes: dict[str, Any] = {name: found[name] for name in ("height", "width", "num_frames") if name in found}
    if hasattr(pipeline, "guider"):
        sizes |= {
            "guidance_scale": pipeline.guider.guidance_scale,
            "max_sequence_length": pipeline.tokenizer_max_length,
        }
    else:
        sizes["guidance_scale"] = pipeline.guidance_scale
    return sizes


@pytest.mark.parametrize("name", TINY)
def test_defaults_are_those_of_a_call_of_the_pipeline(name: str, tmp_path: Path) -> None:
    model = getattr(tiny_pipelines, name)(tmp_path / "model")
    called, default = sizes_in_a_call(model), default_generation(model)
    assert set(default) == {field.name for field in dataclasses.fields(Generation)}
    assert {"height", "width", "num_frames"} < set(called)
    frames = called["num_frames"]
    if (
        "1_5" in name and "cog" in name
    ):  # the pipeline adds frames up to a whole token of two latents, and drops them again
        frames -= 4
    if name == "cogvideox_5b_i2v":  # for its pipeline's 49, diffusers would take other positions than the model's
        frames = TINY_MODELS["CogVideoX-5B from an image"].settings["sample_frames"]
    assert default["num_frames"] == min(frames, Generation().num_frames)
    assert {**default, **called, "num_frames": 0} == {**default, "num_frames": 0}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("cogvideox-5b", Generation(480, 720, 49, 50, 6.0, 226)),
        ("hunyuanvideo-1.5", Generation(480, 848, 61, 50, 6.0, 1000)),
        ("ltx-video", Generation(512, 704, 57, 50, 3.0, 128)),
        ("mochi", Generation(480, 848, 19, 64, 4.5, 256)),
    ],
)
def test_defaults_of_published_models(model: str, expected: Generation) -> None:
    assert default_generation(ROOT / "configs" / "models" / model) == expected.to_dict()


def test_defaults_come_from_the_files_of_the_model(tmp_path: Path) -> None:
    model = tiny_pipelines.hunyuan_video_15(tmp_path / "model")
    edit(model / "guider" / "guider_config.json", guidance_scale=2.5)
    edit(model / "transformer" / "config.json", target_size=640)
    found = default_generation(model)
    assert found["guidance_scale"] == 2.5
    assert found["height"] % 16 == found["width"] % 16 == 0
    assert found["width"] / found["height"] == pytest.approx(16 / 9, rel=0.02)
    model = tiny_pipelines.cogvideox_1_5(tmp_path / "other")
    edit(model / "transformer" / "config.json", sample_height=300, sample_width=340, sample_frames=81)
    found = default_generation(model)
    assert (found["height"], found["width"], found["num_frames"]) == (768, 1360, 61), "not all of its positions"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sizes_that_a_model_takes() -> None:
    steps = size_steps(ROOT / "configs" / "models" / "ltx-video")
    assert steps == SizeSteps(height=32, width=32, frames=8, first=1)
    assert [steps.num_frames(most) for most in (161, 61, 57, 56, 1)] == [161, 57, 57, 49, 1]
    assert names(str(steps), 32, "8 k + 1")
