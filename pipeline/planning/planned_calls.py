"""The calls that a run will record, without values: the transformer's own code run on the meta device, a block of each kind."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pipeline.context import RunContext
from pipeline.planning.meta_run import to_dtype
from pipeline.planning.token_counts import TokenCounts
from reelquant.calibration.block_call import Constants, Recording, Streams
from reelquant.calibration.without_values import META, answers
from reelquant.families.family import Config, Family, VideoSize, family_of_architecture
from reelquant.tokens import band_width
from workers.model_source import build_on_meta


@dataclass(frozen=True)
class PlannedCall:
    """A call of the transformer for one video, and what is recorded of its blocks."""

    arguments: dict[str, Any]
    streams: Streams
    """In front of any block."""
    constants: Constants


def planned_arguments(context: RunContext, size: VideoSize, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a call of the transformer on the meta device."""
    return _arguments(context.model.family, context.model.config, size, dtype)


def planned_call(
    context: RunContext, counts: TokenCounts, dtype: torch.dtype, *, conditional: bool = True
) -> PlannedCall:
    """The call with the longest text among the calibration prompts; recorded once a process for calls of the same shapes.

    Args:
        conditional: False for the unconditional call: no text of a prompt is there for a second encoder.
    """
    config = json.dumps(dict(context.model.config))
    size = counts.longest if conditional else replace(counts.longest, num_second_text=0)
    return _recorded(config, context.model.family.architecture, size, dtype)


def call_problems(context: RunContext, counts: TokenCounts, dtype: torch.dtype) -> list[str]:
    """Why the transformer cannot take the videos of a run, as its own code says it."""
    try:
        planned_call(context, counts, dtype)
    except (RuntimeError, ValueError, IndexError) as error:
        size = counts.size
        return [
            f"generation: {context.model.family.name} cannot take latents of {size.frames} x {size.height} x {size.width} "
            f"({error}): set generation.height, generation.width or generation.num_frames to less"
        ]
    return []


def band_problems(context: RunContext, counts: TokenCounts, dtype: torch.dtype) -> list[str]:
    """Methods, and settings of the evaluation, whose density is narrower than one token at this run's shapes."""
    layout = planned_call(context, counts, dtype).constants.layout
    methods = [(m.name, m.recipe.sparse) for m in context.methods]
    densities = {f"method {name}: attention.density": sparse.density for name, sparse in methods if sparse is not None}
    settings = context.config.evaluation.settings.items()
    densities |= {f"evaluation.settings.{name}.density": s.density for name, s in settings if s.density is not None}
    problems = []
    for place, density in densities.items():
        try:
            band_width(layout, density)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    return problems


def _arguments(family: Family, config: Config, size: VideoSize, dtype: torch.dtype) -> dict[str, Any]:
    with META:
        call = family.inputs(config, size)
    cast = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, call)
    return cast if family.rounds_timesteps else {**cast, "timestep": call["timestep"]}


@lru_cache(maxsize=64)
def _recorded(config: str, architecture: str, size: VideoSize, dtype: torch.dtype) -> PlannedCall:
    family, whole = family_of_architecture(architecture), json.loads(config)
    call = _arguments(family, whole, size, dtype)
    short = {**whole, **dict.fromkeys(family.blocks.values(), 1)}
    transformer = to_dtype(build_on_meta(short, family), dtype)
    recording = Recording(family, transformer, call, family.block_names(short)[:1])
    seen: list[Streams] = []

    def see(_name: str, streams: Streams | None) -> None:
        if streams is not None:
            seen.append(streams)

    with META, answers(), torch.no_grad(), recording.watching(see):
        transformer(**call)
    assert recording.constants is not None
    return PlannedCall(call, seen[0], recording.constants)
