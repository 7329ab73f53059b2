"""Mochi: joint attention with the text after the video, in another width; its last block changes no text.

Padding is left out of attention and of the pooled text, so dropping it changes no real token. The timesteps of a schedule rise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule, retrieve_timesteps

from reelquant.families.family import Arguments, Config, Family, VideoSize
from reelquant.tokens import Grid

NUM_TRAIN_TIMESTEPS = 1000
THRESHOLD_NOISE = 0.025
"""The pipeline's: the end of the linear part of its schedule."""


def _grid(config: Config, call: Arguments) -> Grid:
    frames, height, width = call["hidden_states"].shape[-3:]
    return frames, height // config["patch_size"], width // config["patch_size"]


def _inputs(config: Config, size: VideoSize) -> dict[str, Any]:
    text = size.batch, size.num_text
    return {
        "hidden_states": torch.empty(size.batch, config["in_channels"], size.frames, size.height, size.width),
        "encoder_hidden_states": torch.empty(*text, config["text_embed_dim"]),
        "timestep": torch.empty(size.batch),
        "encoder_attention_mask": torch.ones(text, dtype=torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _call_defaults(_config: Config, _side: int) -> dict[str, int]:
    return {"height": 480, "width": 848}


def _noise_level(timestep: float) -> float:
    return 1 - timestep / NUM_TRAIN_TIMESTEPS


def _noise_levels(scheduler: Any, num_steps: int, _num_video: int | None) -> list[float]:
    sigmas = np.array(linear_quadratic_schedule(num_steps, THRESHOLD_NOISE))
    timesteps, _ = retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=sigmas)
    return [_noise_level(float(timestep)) for timestep in timesteps]


FAMILY = Family(
    name="Mochi",
    architecture="MochiTransformer3DModel",
    blocks={"transformer_blocks": "num_layers"},
    self_attention="attn1",
    text="after",
    grid=_grid,
    inputs=_inputs,
    noise_level=_noise_level,
    noise_levels=_noise_levels,
    outside={"time_embed.*": "embedder", "norm_out.*": "embedder"},
    guidance="batched",
    frames_per_second=30,
    side_multiple=8,
    padding=(("encoder_hidden_states", "encoder_attention_mask"),),
    needs_text=False,
    call_defaults=_call_defaults,
    joined=(("norm1.linear", "norm1_context.linear", "norm1_context.linear_1"),),
)
