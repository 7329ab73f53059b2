"""Bytes of the calibration store, stage by stage: exact, from the shapes of the arrays that the workers write."""

from __future__ import annotations

import torch

from pipeline.context import RunContext
from pipeline.planning.token_counts import TokenCounts
from pipeline.run_units import NOISE_FLOOR, evaluated_models, num_videos, reads_activations
from storage.zarr_array import array_bytes


def trajectory_bytes(context: RunContext, counts: TokenCounts, dtype: torch.dtype) -> int:
    """All trajectories: latents, conditions, the recorded salience of every candidate, videos.

    Args:
        dtype: of the model, in which the text embeddings are kept.
    """
    config, steps = context.model.config, context.config.generation.num_inference_steps
    width, features = hidden_size(context), context.config.selection.features
    salience = {"latent": (steps,), "block_input": (steps, len(context.model.blocks)), "weight_error": (steps,)}
    shared = (
        array_bytes((steps + 1, *counts.latent_shape), torch.float32)
        + array_bytes((int(config["pooled_projection_dim"]),), dtype)
        + array_bytes((steps, width), torch.float32)  # temb
        + 2 * array_bytes((steps,), torch.float32)  # timesteps, diffusion
        + sum(array_bytes(salience[feature], torch.float32) for feature in features)
        + array_bytes(counts.video_shape, torch.uint8)
    )
    text = sum(array_bytes((num, int(config["text_embed_dim"])), dtype) for num in counts.text.values())
    return shared * len(counts.text) + text


def activation_bytes(context: RunContext, counts: TokenCounts) -> int:
    """The streams of all samples at all segment boundaries, each as long as that of the longest prompt."""
    if not reads_activations(context.config):
        return 0
    width, boundaries = hidden_size(context), len(context.segments)
    sample = boundaries * array_bytes((counts.longest_stream, width), torch.bfloat16)
    return context.config.selection.num_samples * (sample + array_bytes((width,), torch.float32))


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
    return videos * array_bytes(counts.video_shape, torch.uint8) + latents + velocities


def hidden_size(context: RunContext) -> int:
    """Width of the stream."""
    return int(context.model.config["num_attention_heads"]) * int(context.model.config["attention_head_dim"])
