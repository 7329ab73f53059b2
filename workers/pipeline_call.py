"""A pipeline called with a run's settings; those that its call does not take are set in the pipeline as long as it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor

from reelquant.settings.generation import Generation
from workers.images import read_image
from workers.messages import PromptUnit

CALL_ARGUMENTS = ("prompt", *(f.name for f in fields(Generation)), "generator", "output_type")
"""Names of the arguments with which a pipeline is called."""
WITH_GUIDER = {
    "guidance_scale": "guider.guidance_scale",
    "max_sequence_length": "tokenizer_max_length",
    "height": "video_processor.calculate_default_height_width",
    "width": "video_processor.calculate_default_height_width",
}
"""Where a pipeline that guides by a component `guider` keeps what its call does not take, or makes it up of an image."""


def set_elsewhere(pipeline_class: Any) -> dict[str, str]:
    """Settings that the call of a pipeline does not take, and its attributes that hold them."""
    if "guider" not in inspect.signature(pipeline_class.__init__).parameters:
        return {}
    taken = inspect.signature(pipeline_class.__call__).parameters
    return {name: place for name, place in WITH_GUIDER.items() if name not in taken}


def called(pipeline: Any, prompts: PromptUnit | Sequence[PromptUnit], generation: Generation, **more: Any) -> Tensor:
    """The frames, or latents, that `pipeline` makes of a prompt or of several.

    Args:
        more: further arguments of its call.
    """
    settings = asdict(generation)
    with ExitStack() as stack:
        for name, place in set_elsewhere(type(pipeline)).items():
            *path, last = place.split(".")
            value = settings.pop(name)
            if name == "guidance_scale":
                value = max(1.0, value)  # at most 1 is no guidance everywhere; a guider extrapolates below 1
            elif name in ("height", "width"):
                value = partial(_size, (generation.height, generation.width))
            owner = attrgetter(".".join(path))(pipeline) if path else pipeline
            stack.enter_context(attribute(owner, last, value))
        frames: Tensor = pipeline(**prompt_arguments(prompts), **settings, **more).frames
    return frames


def _size(size: tuple[int, int], *_: Any, **__: Any) -> tuple[int, int]:
    return size


def guider_problem(guider: Any) -> str | None:
    """Why generations with `guider` cannot be recorded: in every step it must call the transformer twice, or never."""
    for scale, wanted in ((1.0, 1), (2.0, 2)):
        with attribute(guider, "guidance_scale", scale):
            for step in (0, 999):
                guider.set_state(step, 1000, None)
                if guider.num_conditions != wanted:
                    return (
                        f"with guidance_scale {scale:g} it makes {guider.num_conditions} calls in step {step} of 1000, not "
                        f"{wanted}: take a ClassifierFreeGuidance whose start is 0, stop 1, enabled true and "
                        "use_original_formulation false"
                    )
    return None


def prompt_arguments(prompts: PromptUnit | Sequence[PromptUnit]) -> dict[str, Any]:
    """The arguments `prompt`, `negative_prompt` and `image` of a pipeline's call, those that there are; lists of texts for
    several prompts, which have one image or none."""
    units = [prompts] if isinstance(prompts, PromptUnit) else list(prompts)
    found: dict[str, Any] = {"prompt": [unit.prompt for unit in units]}
    if any(unit.negative_prompt for unit in units):
        found["negative_prompt"] = [unit.negative_prompt or "" for unit in units]
    if isinstance(prompts, PromptUnit):
        found = {name: text for name, [text] in found.items()}
    if (image := units[0].image) is not None:
        assert all(unit.image == image for unit in units), "one image a call (pipeline.setting_checks)"
        found["image"] = read_image(image)
    return found


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While open, the instance has this attribute in place of its own or its class's."""
    missing = object()
    before = vars(owner).get(name, missing)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)
