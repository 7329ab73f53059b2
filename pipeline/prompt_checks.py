"""Whether the prompts of a run have what its pipeline asks for, and nothing that it would ignore or distort."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import diffusers

from pipeline.config.json_lines import FORM, JSON_LINES, line_numbers
from pipeline.config.prompts import Prompt
from pipeline.config.schema import RunConfig
from pipeline.model_facts import ModelFacts
from reelquant.checkpoint.pipeline_files import MODEL_INDEX
from reelquant.settings.generation import Generation
from workers.generation import UNCOND, branches
from workers.model_source import compression, image_use, video_size

MOST_STRETCH = 1.1
"""Pipelines stretch an image to the video's height and width: so much its proportions may change."""


def input_problems(config: RunConfig, prompts: Mapping[str, Sequence[Prompt]], model: ModelFacts) -> list[str]:
    """What is wrong with images and negative prompts.

    Args:
        prompts: by key of `prompts`.
    """
    problems = _frame_problems(config.generation, model)
    for key, own in prompts.items():
        problems += _image_problems(f"prompts.{key}: {getattr(config.prompts, key)}", own, config.generation, model)
        problems += _negative_problems(f"prompts.{key}: {getattr(config.prompts, key)}", own, config, model)
    if config.evaluation.prompts_per_pass > 1 and any(prompt.image for prompt in prompts.get("held_out", ())):
        problems.append(
            f"evaluation.prompts_per_pass is {config.evaluation.prompts_per_pass}, but held-out prompts have images, and "
            "pipelines take one image a call: set it to 1"
        )
    return problems


def _frame_problems(generation: Generation, model: ModelFacts) -> list[str]:
    """Whether the image's frame is the only one, so that there is nothing to make."""
    if model.layout is None:
        return []  # said elsewhere
    size = video_size(model.folder, generation)
    apart = size.token_timesteps and size.num_image is not None
    if size.frames > 1 or not (apart or model.family.first_frame_of(model.config) != "made"):
        return []
    temporal, _ = compression(model.folder)
    return [
        f"generation.num_frames is {generation.num_frames}: in {model.inputs.name} all of the video would be the image's "
        f"frame; set {temporal + 1} or more"
    ]


def _image_problems(where: str, prompts: Sequence[Prompt], generation: Generation, model: ModelFacts) -> list[str]:
    pipeline = model.inputs
    given = [prompt for prompt in prompts if prompt.image is not None]
    if given and pipeline.image == "none":
        return [
            f"{where}, {_lines(given)}: an image is given, but {pipeline.name} takes none: leave image out, or "
            f"{_way_to_images(model)}"
        ]
    problems = []
    if pipeline.image == "needed" and (lacking := [prompt for prompt in prompts if prompt.image is None]):
        problems.append(
            f"{where}, {_lines(lacking)}: no image is given, but {pipeline.name} makes a video from one: write lines of JSON "
            f"into a file whose name ends in {JSON_LINES}, {FORM}, or set model to a text-to-video model"
        )
    stretched = [found for prompt in given if (found := _stretched(prompt, generation)) is not None]
    if stretched:
        problems.append(
            f"{where}: stretched to the video's {generation.width} x {generation.height}, more than {MOST_STRETCH} times, "
            f"would be the image of {'; '.join(stretched)}: crop to the video's proportions, or change generation.height and "
            "generation.width"
        )
    return problems


def _way_to_images(model: ModelFacts) -> str:
    """Beside leaving them out: another pipeline of a model that takes them or not, or another model."""
    other = f"{model.inputs.name.removesuffix('Pipeline')}ImageToVideoPipeline"
    if image_use(model.folder, model.family, model.config) == "optional" and hasattr(diffusers, other):
        return f"name {other} as _class_name in {model.folder / MODEL_INDEX}: this model takes images there"
    return "set model to an image-to-video model"


def _stretched(prompt: Prompt, generation: Generation) -> str | None:
    """Which image changes its proportions too much, and how much."""
    assert prompt.image is not None
    width, height = prompt.image.size
    stretch = math.exp(abs(math.log(width * generation.height / (height * generation.width))))
    if stretch <= MOST_STRETCH:
        return None
    return f"line {prompt.line} ({prompt.image.path}, {width} x {height} pixels, {stretch:.2f} times)"


def _negative_problems(where: str, prompts: Sequence[Prompt], config: RunConfig, model: ModelFacts) -> list[str]:
    given = [prompt for prompt in prompts if prompt.negative_prompt is not None]
    if not given or (model.inputs.negative_prompt and UNCOND in branches(model.family, config.generation)):
        return []
    ways = f"leave negative_prompt out of {_lines(given)}"
    if model.family.guidance == "one_pass":
        return [f"{where}: a negative prompt is given, but a step of {model.family.name} has one pass: {ways}"]
    return [
        f"{where}: a negative prompt is given, but with generation.guidance_scale {config.generation.guidance_scale:g} there "
        f"is no unconditional pass: {ways}, or set generation.guidance_scale above 1"
    ]


def _lines(prompts: Sequence[Prompt]) -> str:
    return line_numbers([prompt.line for prompt in prompts])
