"""Whether the prompts of a run have what its pipeline asks for, and nothing that it would ignore or distort."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.config.json_lines import FORM, JSON_LINES, line_numbers
from pipeline.config.prompts import Prompt
from pipeline.config.schema import RunConfig
from pipeline.model_facts import ModelFacts
from reelquant.settings.generation import Generation
from workers.generation import UNCOND, branches

MOST_STRETCH = 1.1
"""Pipelines stretch an image to the video's height and width: so much its proportions may change."""


def input_problems(config: RunConfig, prompts: Mapping[str, Sequence[Prompt]], model: ModelFacts) -> list[str]:
    """What is wrong with images and negative prompts.

    Args:
        prompts: by key of `prompts`.
    """
    problems = []
    for key, own in prompts.items():
        problems += _image_problems(f"prompts.{key}: {getattr(config.prompts, key)}", own, config.generation, model)
        problems += _negative_problems(f"prompts.{key}: {getattr(config.prompts, key)}", own, config, model)
    if config.evaluation.prompts_per_pass > 1 and any(prompt.image for prompt in prompts.get("held_out", ())):
        problems.append(
            f"evaluation.prompts_per_pass is {config.evaluation.prompts_per_pass}, but held-out prompts have images, and "
            "pipelines take one image a call: set it to 1"
        )
    return problems


def _image_problems(where: str, prompts: Sequence[Prompt], generation: Generation, model: ModelFacts) -> list[str]:
    pipeline = model.inputs
    given = [prompt for prompt in prompts if prompt.image is not None]
    if given and pipeline.image == "none":
        return [
            f"{where}, {_lines(given)}: an image is given, but {pipeline.name} takes none: leave image out, or set model to an "
            "image-to-video model"
        ]
    problems = []
    if pipeline.image == "needed" and (lacking := [prompt for prompt in prompts if prompt.image is None]):
        problems.append(
            f"{where}, {_lines(lacking)}: no image is given, but {pipeline.name} makes a video from one: write lines of JSON "
            f"into a file whose name ends in {JSON_LINES}, {FORM}, or set model to a text-to-video model"
        )
    for prompt in given:
        assert prompt.image is not None
        width, height = prompt.image.size
        stretch = math.exp(abs(math.log(width * generation.height / (height * generation.width))))
        if stretch > MOST_STRETCH:
            problems.append(
                f"{where}, line {prompt.line}: image: {prompt.image.path} has {width} x {height} pixels, and would be "
                f"stretched {stretch:.2f} times to the video's {generation.width} x {generation.height} (at most "
                f"{MOST_STRETCH}): crop it to the video's proportions, or change generation.height and generation.width"
            )
    return problems


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
