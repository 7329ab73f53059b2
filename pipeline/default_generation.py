"""What a model's pipeline generates where its call names neither size nor steps, from the files of its settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipeline.planning.token_counts import only_frames, patches
from reelquant.calibration.without_values import META
from reelquant.checkpoint.pipeline_files import read_json
from reelquant.families.family import Config, Family, VideoSize
from reelquant.settings.generation import Generation
from workers.component_check import pipeline_class_of
from workers.model_source import compression, family_of_model, transformer_config
from workers.pipeline_call import set_elsewhere

_GUIDER = "guider"


@dataclass(frozen=True)
class SizeSteps:
    """Sizes of videos that VAE, patches and pipeline of a model take."""

    height: int
    """Divides the height."""
    width: int
    """Divides the width."""
    frames: int
    """Frames are a multiple of it and `first` more."""
    first: int

    def num_frames(self, most: int) -> int:
        """The largest number of frames that is at most `most`; the smallest one where all are larger."""
        return self.first + max(0, (most - self.first) // self.frames) * self.frames

    def __str__(self) -> str:
        """`heights that are multiples of 16, widths of 16, and 4 k + 1 frames`."""
        return f"heights that are multiples of {self.height}, widths of {self.width}, and {self.frames} k + {self.first} frames"


def size_steps(model: Path) -> SizeSteps:
    """Sizes that the model in a sound folder takes."""
    family, (temporal, spatial) = family_of_model(model), compression(model)
    frames, height, width = patches(family, transformer_config(model))
    height, width = (math.lcm(spatial * size, family.side_multiple) for size in (height, width))
    return SizeSteps(height, width, frames=temporal * frames, first=(frames - 1) * temporal + 1)


def default_generation(model: Path) -> dict[str, Any]:
    """Settings of `Generation` that the pipeline of a sound folder has where its call names none; others are left out.

    They are the defaults of its signature; what the pipeline takes in place of a None, which its family says; what its guider
    says; and as many text tokens as the transformer reads, where it reads no other number. Of frames there are at most as many
    as a run's default, as long videos cost most.
    """
    pipeline_class, family, config = pipeline_class_of(model), family_of_model(model), transformer_config(model)
    parameters = inspect.signature(pipeline_class.__call__).parameters
    found: dict[str, Any] = {}
    if family.call_defaults is not None:
        found |= family.call_defaults(config, compression(model)[1])
    found |= {
        name: parameter.default for name, parameter in parameters.items() if isinstance(parameter.default, int | float)
    }
    if set_elsewhere(pipeline_class).get("guidance_scale", "").startswith(f"{_GUIDER}."):
        found |= _guider_settings(model)
    if (num_text := _fixed_text(family, config)) is not None:
        found["max_sequence_length"] = num_text
    if "num_frames" in found:
        found["num_frames"] = size_steps(model).num_frames(min(found["num_frames"], Generation().num_frames))
    if (only := only_frames(family, config)) is not None:
        found["num_frames"] = (only - 1) * compression(model)[0] + 1
    return {field.name: found[field.name] for field in fields(Generation) if field.name in found}


def _guider_settings(model: Path) -> Mapping[str, Any]:
    path = model / _GUIDER / "guider_config.json"
    return read_json(path) if path.is_file() else {}


def _fixed_text(family: Family, config: Config) -> int | None:
    """Text tokens that the transformer reads, no more and no fewer; None where their number is free."""
    size = VideoSize(frames=48, height=48, width=48, num_text=1)
    with META:
        calls = [family.inputs(config, replace(size, num_text=num)) for num in (1, 2)]
    one, two = (call["encoder_hidden_states"].shape[1] for call in calls)
    return one if one == two else None
