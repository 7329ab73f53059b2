"""Bytes of the calibration store, stage by stage: exact, from the shapes of the arrays that the workers write."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.context import RunContext
from pipeline.planning.planned_calls import planned_arguments, planned_call
from pipeline.planning.token_counts import TokenCounts
from pipeline.run_units import NOISE_FLOOR, evaluated_models, num_videos, reads_activations
from reelquant.families.family import InputGroup, VideoSize
from storage.arrays import array_bytes
from storage.unit_store import GROUP_METADATA
from workers.generation import COND
from workers.stored_calls import LatentsPlace, write_constants, write_steps


def trajectory_bytes(context: RunContext, counts: TokenCounts, dtype: torch.dtype) -> int:
    """All trajectories: latents, the transformer's calls, the recorded salience of every candidate, videos.

    Args:
        dtype: of the model, in which the text's states are kept.
    """
    steps, features = context.config.generation.num_inference_steps, context.config.selection.features
    salience = {"latent": (steps,), "block_input": (steps, len(context.model.blocks)), "weight_error": (steps,)}
    width = conditioning_width(context)
    shared = (
        array_bytes((steps + 1, *counts.latent_shape), torch.float32)
        + (array_bytes((_conditioning_rows(context), width), torch.float32) if width else 0)
        + 2 * array_bytes((steps,), torch.float32)  # timesteps, diffusion
        + sum(array_bytes(salience[feature], torch.float32) for feature in features)
        + array_bytes(counts.video_shape, torch.uint8)
        + len(GROUP_METADATA)
    )
    conditional = sum(_call_bytes(context, counts, dtype, size) for size in counts.calls.values())
    # How long the empty prompt is, only the pipeline knows: at most this.
    empty = replace(counts.size, num_second_text=0)
    others = (len(context.branches) - 1) * _call_bytes(context, counts, dtype, empty)
    return (shared + others) * len(counts.text) + conditional


def _call_bytes(context: RunContext, counts: TokenCounts, dtype: torch.dtype, size: VideoSize) -> int:
    """The transformer's calls of one branch of a generation."""
    steps = context.config.generation.num_inference_steps
    constant = planned_arguments(context, size, dtype)
    timestep, hidden = constant.pop("timestep"), constant.pop("hidden_states")
    total = len(GROUP_METADATA)

    def write(_name: str, value: Tensor) -> None:
        nonlocal total
        total += array_bytes(tuple(value.shape), value.dtype)

    changing = {"timestep": torch.empty(steps, *timestep.shape, dtype=timestep.dtype, device="meta")}
    write_steps(write, constant, changing, {"hidden_states": _latents_place(hidden, context, counts)})
    return total


def _latents_place(hidden: Tensor, context: RunContext, counts: TokenCounts) -> LatentsPlace | None:
    """Where the latents lie in the transformer's input: in front of an image's channels, or behind an image's frame."""
    if not counts.latent_shape:
        return None  # not known (`counts.problems`)
    frames, channels = 2 - context.model.family.channel_axis, context.model.family.channel_axis - 1
    if tuple(hidden.shape[1:]) == counts.latent_shape:
        if counts.size.num_image is None or not counts.size.token_timesteps:
            return None
        place = LatentsPlace(frames, 1, 1, hidden)
    elif context.model.family.first_frame_of(context.model.config) == "given":
        place = LatentsPlace(frames, 1, 0, hidden)
    else:
        place = LatentsPlace(channels, 0, 0, hidden)
    return replace(place, rest=place.without_latents(hidden, counts.latent_shape[place.axis]))


def activation_bytes(context: RunContext, counts: TokenCounts, dtype: torch.dtype) -> int:
    """The recorded calls of all samples at all segment boundaries, each as long as that of the longest prompt."""
    if not reads_activations(context.config) or counts.problems:
        return 0
    branches = sum(_branch_bytes(context, counts, dtype, conditional=branch == COND) for branch in context.branches)
    samples = len(context.model.roles) * context.config.selection.num_samples
    return samples * (len(GROUP_METADATA) + branches)


def _branch_bytes(context: RunContext, counts: TokenCounts, dtype: torch.dtype, *, conditional: bool) -> int:
    """The recorded calls of one sample in one branch."""
    call = planned_call(context, counts, dtype, conditional=conditional)
    streams = sum(array_bytes(tuple(stream.shape), torch.bfloat16) for stream in call.streams.values())
    total = len(GROUP_METADATA) + len(context.segments) * (streams + len(GROUP_METADATA))

    def write(_name: str, value: Tensor) -> None:
        nonlocal total
        total += array_bytes(tuple(value.shape), value.dtype)

    write_constants(call.constants, write)
    return total


def evaluation_bytes(context: RunContext, counts: TokenCounts) -> int:
    """The videos of the held-out prompts, of every model, and the full-precision trajectories: latents of all prompts,
    velocities of those with teacher-forced passes; the noise floor keeps none. Their films (`.mp4`), whose size nobody knows
    beforehand, are not counted: a few hundredths of it."""
    steps, measured = context.config.generation.num_inference_steps, context.config.num_velocity_prompts
    models = [model for model in evaluated_models(context.config) if model != NOISE_FLOOR]
    held_out = len(context.held_out_prompts)
    latents = held_out * array_bytes((steps + 1, *counts.latent_shape), torch.float32) if measured else 0
    velocities = measured * array_bytes((steps, *counts.latent_shape), torch.float32)
    videos = sum(num_videos(context.config, model) for model in models)
    return videos * (array_bytes(counts.video_shape, torch.uint8) + len(GROUP_METADATA)) + latents + velocities


def conditioning_width(context: RunContext) -> int:
    """Width of what the modulation layers read; 0 where the blocks have none."""
    block, groups = next(iter(context.model.calls)), _conditioning_groups(context)
    return context.model.linears[f"{block}.{groups[0].name}"][1] if groups else 0


def num_conditioning_rows(context: RunContext) -> int:
    """Rows of it at all candidates."""
    return len(context.calibration_prompts) * _conditioning_rows(context)


def _conditioning_rows(context: RunContext) -> int:
    """Rows of it in a trajectory."""
    calls = max((group.num_calls for group in _conditioning_groups(context)), default=0)
    return context.config.generation.num_inference_steps * len(context.branches) * calls


def _conditioning_groups(context: RunContext) -> list[InputGroup]:
    call = next(iter(context.model.calls.values()))
    return [group for level in call.levels for group in level if group.stream == "conditioning"]
