"""LTX-Video: self-attention over the video alone, cross-attention to the text, modulation by a table of each block.

The pipeline packs its latents to tokens `[B, frames * height * width, channels]`, and has both passes of guidance in one batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift, retrieve_timesteps

from reelquant.families.family import Arguments, Config, Family, VideoSize
from reelquant.tokens import Grid

NUM_TRAIN_TIMESTEPS = 1000


def _grid(_config: Config, call: Arguments) -> Grid:
    return call["num_frames"], call["height"], call["width"]


def _inputs(config: Config, size: VideoSize) -> dict[str, Any]:
    text = size.batch, size.num_text
    return {
        "hidden_states": torch.empty(size.batch, size.frames * size.height * size.width, config["in_channels"]),
        "encoder_hidden_states": torch.empty(*text, config["caption_channels"]),
        "timestep": torch.empty(size.batch),
        "encoder_attention_mask": torch.ones(text, dtype=torch.bool),
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _noise_level(timestep: float) -> float:
    return timestep / NUM_TRAIN_TIMESTEPS


def _noise_levels(scheduler: Any, num_steps: int, num_video: int | None) -> list[float]:
    longest = scheduler.config.get("max_image_seq_len", 4096)
    mu = calculate_shift(
        longest if num_video is None else num_video,
        scheduler.config.get("base_image_seq_len", 256),
        longest,
        scheduler.config.get("base_shift", 0.5),
        scheduler.config.get("max_shift", 1.15),
    )
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    timesteps, _ = retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=sigmas, mu=mu)
    return [_noise_level(float(timestep)) for timestep in timesteps]


def _refusal(config: Config) -> str | None:
    sizes = config["patch_size"], config["patch_size_t"]
    return None if sizes == (1, 1) else f"patch_size and patch_size_t are {sizes}; only 1 and 1 are supported"


FAMILY = Family(
    name="LTX-Video",
    architecture="LTXVideoTransformer3DModel",
    blocks={"transformer_blocks": "num_layers"},
    self_attention="attn1",
    text="apart",
    grid=_grid,
    inputs=_inputs,
    noise_level=_noise_level,
    noise_levels=_noise_levels,
    outside={"time_embed.*": "embedder", "caption_projection.*": "embedder"},
    guidance="batched",
    side_multiple=32,
    channel_axis=2,
    refusal=_refusal,
)
