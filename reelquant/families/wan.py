"""Wan 2.1 and 2.2, text to video: self-attention over the video alone, cross-attention to the text, modulation by a table.

Text is padded with zeros, which are attended. Guidance takes two passes. Wan2.2-A14B has a transformer for the noisy steps and
another one for the rest; both are built alike.
"""

from __future__ import annotations

from typing import Any

import torch

from reelquant.families.family import Arguments, Config, Family, VideoSize
from reelquant.tokens import Grid

NUM_TRAIN_TIMESTEPS = 1000


def _grid(config: Config, call: Arguments) -> Grid:
    sizes = call["hidden_states"].shape[-3:]
    frames, height, width = (size // patch for size, patch in zip(sizes, config["patch_size"], strict=True))
    return frames, height, width


def _inputs(config: Config, size: VideoSize) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(size.batch, config["in_channels"], size.frames, size.height, size.width),
        "timestep": torch.empty(size.batch, dtype=torch.int64),
        "encoder_hidden_states": torch.empty(size.batch, size.num_text, config["text_dim"]),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _noise_level(timestep: float) -> float:
    return timestep / NUM_TRAIN_TIMESTEPS


def _noise_levels(scheduler: Any, num_steps: int, _num_video: int | None) -> list[float]:
    scheduler.set_timesteps(num_steps)
    return [_noise_level(float(timestep)) for timestep in scheduler.timesteps]


def _refusal(config: Config) -> str | None:
    if config.get("image_dim") is not None or config["in_channels"] != config["out_channels"]:
        return "it reads an image beside the text; only text to video is supported"
    return None


FAMILY = Family(
    name="Wan",
    architecture="WanTransformer3DModel",
    blocks={"blocks": "num_layers"},
    self_attention="attn1",
    text="apart",
    grid=_grid,
    inputs=_inputs,
    noise_level=_noise_level,
    noise_levels=_noise_levels,
    outside={"condition_embedder.*": "embedder"},
    guidance="two_passes",
    boundary="boundary_ratio",
    side_multiple=16,
    refusal=_refusal,
)
