"""`init`: writes a commented configuration of a run for a model, which `plan` accepts as it stands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.config.loading import ConfigError, load_yaml, parse_config, parse_override, set_value
from pipeline.config.schema import BitsConfig
from pipeline.context import PROMPT_FILES, build_context, check_found
from pipeline.default_generation import default_generation, size_steps
from pipeline.hub_model import find_model, pinned
from pipeline.planning.token_counts import size_problems
from reelquant.checkpoint.pipeline_files import list_files
from reelquant.settings.generation import Generation
from storage.location import expand_home
from workers.component_check import pipeline_inputs

_ROOT = Path(__file__).resolve().parents[1]
_WIDTH = 120

COMMENTS = {
    "run": "Everything is kept here, a path or s3://bucket/prefix; running again resumes here.",
    "model": """A folder in diffusers format, or an id of the Hugging Face Hub. More keys about it:
  model_revision: main    branch, tag or commit on the Hub; the run records the commit and keeps it
  model_variant: fp16     weight files of a variant, where there are no others""",
    "generation": """Size, frames and steps with which you will generate. Given are the defaults of the model's pipeline, with
fewer frames where those are many; the model's authors may name better ones. Less of each takes less time, disk and memory.
This model takes {steps}.""",
    "prompts": """Files with one prompt a line: put yours here. The model is calibrated on the first and judged on the second.
The number of calibration prompts times that of steps gives the samples to choose from.""",
    "selection": "Samples on which the model is calibrated.",
    "method": "The preset: reelquant; gptq, which learns nothing and is quick; s2q_quantsparse, with sparse attention.",
    "bits": "Of the linear layers in the blocks.",
    "distillation": "Blocks that one worker calibrates in a row. Fewer: more workers at once, and more disk.",
    "workers": """GPUs of a worker: 1 on machines that have some, 0 on a CPU. Where one cannot hold the model, several share it:
{num_gpus: 1, sharding: fsdp, gpus_per_replica: 2}""",
    "cluster": "A running Ray cluster: auto, or host:port. null is this machine.",
}
"""Above each key of the file; `{steps}` are the sizes that the model takes."""
IMAGE_PROMPTS = """This model makes a video from an image and a prompt: write both files, with lines of JSON such as
  {line}
where the image's path is from the file's folder. Images have {width} x {height} pixels, or these proportions.
The model is calibrated on the first file and judged on the second.
The number of calibration prompts times that of steps gives the samples to choose from."""
"""Above `prompts`, in the file for such a model."""
IMAGE_LINE = '{"prompt": "a gull lands on a pier", "image": "gull.jpg"}'
_IMAGE_FILES = {"calibration": "images/calibration.jsonl", "held_out": "images/held_out.jsonl"}


@dataclass(frozen=True)
class NewConfig:
    """A configuration that was written."""

    file: Path
    absent: dict[str, int]
    """Files of prompts that are to be written before a run, and how many lines a run takes of each."""
    image_size: tuple[int, int]
    """Width and height for their images."""


def write_config(
    file: Path, model: str, overrides: Sequence[str] = (), *, revision: str | None = None, variant: str | None = None
) -> NewConfig:
    """Writes the configuration.

    Args:
        file: a new file.
        model: a folder, or an id of the Hub, of which all but the weights is fetched.
        overrides: `key.path=value`, as of the other commands.
        revision, variant: the keys `model_revision` and `model_variant`; None leaves them out.

    Raises:
        ValueError: the model cannot be used, or an override is wrong; all that is.
        FileExistsError: the file is there already.
    """
    file = expand_home(file)
    if os.path.lexists(file):
        raise FileExistsError(f"{file} is there already: give another name, or remove it")
    if not file.parent.is_dir():
        raise ConfigError([f"{file}: there is no folder {file.parent}: make it, or give another file"])
    about_model = {"model": model, "model_revision": revision, "model_variant": variant}
    given = {key: value for key, value in about_model.items() if value is not None}
    values, folder, to_write = _values(file, given, overrides)
    text = _text(values, _comments(folder, parse_config(values, str(file)).generation))
    context = build_context(parse_config(load_yaml(text, str(file)), str(file)), weights=False, may_lack=to_write)
    found = context.model.found
    lacking = list_files(found.folder, variant=variant)[1] if variant else ()
    if problems := found.problems or lacking or size_problems(context):
        raise ConfigError(problems)
    with file.open("x", encoding="utf-8") as opened:
        opened.write(text)
    prompts, size = context.config.prompts, context.config.generation
    absent = {str(getattr(prompts, key)): int(getattr(prompts, f"num_{key}")) for key in context.absent_prompts}
    return NewConfig(file, absent, (size.width, size.height))


def _values(file: Path, model: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], Path, list[str]]:
    """The values of the file, the model's folder, and keys of `prompts` whose files are to be written."""
    values: dict[str, Any] = {
        "run": f"runs/{file.stem}",
        **model,
        "generation": {},
        "prompts": {
            "calibration": _shipped("scenes_calibration.txt"),
            "num_calibration": 10,
            "held_out": _shipped("scenes_held_out.txt"),
            "num_held_out": 16,
        },
        "selection": {"num_samples": 20},
        "method": {"preset": "reelquant"},
        "bits": BitsConfig().model_dump(include={"weight", "activation"}),
        "distillation": {"segment_length": 8},
        "workers": {"num_gpus": 1 if torch.cuda.is_available() else 0},
        "cluster": {"address": None},
    }
    asked: dict[str, Any] = {}
    for key, value in (parse_override(override) for override in overrides):
        for target in (values, asked):
            set_value(target, key, value, where=f"--set {key}")
    found = find_model(pinned(parse_config(values, str(file)))[0])
    checked = check_found(found, variant=model.get("model_variant"), weights=False)
    if not checked.can_plan:
        raise ConfigError(checked.problems)
    values["generation"] = {**default_generation(found.folder), **values["generation"]}
    if pipeline_inputs(found.folder).image != "needed":
        return values, found.folder, []
    to_write = [key for key in PROMPT_FILES if key not in asked.get("prompts", {})]
    values["prompts"] |= {key: _IMAGE_FILES[key] for key in to_write}
    return values, found.folder, to_write


def _comments(model: Path, size: Generation) -> dict[str, str]:
    """What stands above the keys, in the file for this model."""
    comments = {**COMMENTS, "generation": COMMENTS["generation"].format(steps=size_steps(model))}
    if pipeline_inputs(model).image == "needed":
        comments["prompts"] = IMAGE_PROMPTS.format(width=size.width, height=size.height, line=IMAGE_LINE)
    return comments


def _shipped(name: str) -> str:
    """A file of prompts of this checkout, relative where the command runs in it."""
    path = _ROOT / "configs" / "prompts" / name
    return str(path.relative_to(_ROOT) if Path.cwd() == _ROOT else path)


def _text(values: dict[str, Any], comments: dict[str, str]) -> str:
    lines = [
        "# A run of reelquant. Keys that are not here have defaults: `python -m pipeline schema` says what each means."
    ]
    for key, value in values.items():
        lines += [f"# {line}" for line in comments.get(key, "").splitlines()]
        lines += _dump(key, value)
    return "\n".join([*lines, ""])


def _dump(key: str, value: Any) -> list[str]:
    """The key's lines: a mapping without mappings inside in one line, if that is short enough."""
    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 10**6}
    if isinstance(value, dict) and not any(isinstance(inner, dict | list) for inner in value.values()):
        line = f"{key}: {yaml.safe_dump(value, default_flow_style=True, **style).strip()}"
        if len(line) <= _WIDTH:
            return [line]
    text: str = yaml.safe_dump({key: value}, default_flow_style=False, **style)
    return text.splitlines()
