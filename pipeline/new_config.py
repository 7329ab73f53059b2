"""`init`: writes a commented configuration of a run for a model, which `plan` accepts as it stands."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.config.loading import ConfigError, load_yaml, parse_config, parse_override, set_value
from pipeline.config.schema import BitsConfig
from pipeline.context import build_context
from pipeline.hub_model import FoundModel, find_model, pinned
from pipeline.planning.token_counts import size_problems
from reelquant.checkpoint.pipeline_files import list_files
from reelquant.settings.generation import Generation
from storage.location import expand_home
from workers.component_check import pipeline_class_of

_ROOT = Path(__file__).resolve().parents[1]
_WIDTH = 120

COMMENTS = {
    "run": "Everything is kept here, a path or s3://bucket/prefix; running again resumes here.",
    "model": """A folder in diffusers format, or an id of the Hugging Face Hub. More keys about it:
  model_revision: main    branch, tag or commit on the Hub; the run records the commit and keeps it
  model_variant: fp16     weight files of a variant, where there are no others""",
    "generation": """Size, frames and steps with which you will generate. Given are the defaults of the model's pipeline,
with fewer frames where those are many. Less of each takes less time, disk and memory.""",
    "prompts": """Files with one prompt a line: put yours here. The model is calibrated on the first and judged on the second.
A model from images needs files of JSON lines, name.jsonl: {"prompt": "...", "image": "path/from/the/file.png"}.
The number of calibration prompts times that of steps gives the samples to choose from.""",
    "selection": "Samples on which the model is calibrated.",
    "method": "The preset: reelquant; gptq, which learns nothing and is quick; s2q_quantsparse, with sparse attention.",
    "bits": "Of the linear layers in the blocks.",
    "distillation": "Blocks that one worker calibrates in a row. Fewer: more workers at once, and more disk.",
    "workers": """GPUs of a worker: 1 on machines that have some, 0 on a CPU. Where one cannot hold the model, several share it:
{num_gpus: 1, sharding: fsdp, gpus_per_replica: 2}""",
    "cluster": "A running Ray cluster: auto, or host:port. null is this machine.",
}
"""Above each key of the file."""


def write_config(
    file: Path, model: str, overrides: Sequence[str] = (), *, revision: str | None = None, variant: str | None = None
) -> Path:
    """Writes the configuration; returns its file.

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
    text = _text(_values(file, given, overrides))
    context = build_context(parse_config(load_yaml(text, str(file)), str(file)), weights=False)
    found = context.model.found
    lacking = list_files(found.folder, variant=variant)[1] if variant else ()
    if problems := found.problems or lacking or size_problems(context):
        raise ConfigError(problems)
    with file.open("x", encoding="utf-8") as opened:
        opened.write(text)
    return file


def _values(file: Path, model: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
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
    parsed = [parse_override(override) for override in overrides]
    for key, value in parsed:
        set_value(values, key, value, where=f"--set {key}")
    found = find_model(pinned(parse_config(values, str(file)))[0])
    values["generation"] = {**_family_defaults(found), **values["generation"]}
    return values


def _family_defaults(model: FoundModel) -> dict[str, Any]:
    """Size, steps and guidance of the videos that the model's pipeline generates where nothing is asked for; and frames, at
    most as many as a run's default, as long videos cost most."""
    pipeline_class = pipeline_class_of(model.folder)
    if pipeline_class is None:
        return {}
    parameters, most = inspect.signature(pipeline_class.__call__).parameters, Generation().num_frames
    found = {
        field.name: parameters[field.name].default
        for field in fields(Generation)
        if field.name in parameters and isinstance(parameters[field.name].default, int | float)
    }
    return {**found, "num_frames": min(found["num_frames"], most)} if "num_frames" in found else found


def _shipped(name: str) -> str:
    """A file of prompts of this checkout, relative where the command runs in it."""
    path = _ROOT / "configs" / "prompts" / name
    return str(path.relative_to(_ROOT) if Path.cwd() == _ROOT else path)


def _text(values: dict[str, Any]) -> str:
    lines = [
        "# A run of reelquant. Keys that are not here have defaults: `pipeline/config/schema.py` says what each means."
    ]
    for key, value in values.items():
        lines += [f"# {line}" for line in COMMENTS.get(key, "").splitlines()]
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
