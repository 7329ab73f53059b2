"""CogVideoX: joint attention with the text in front of the video, both passes of guidance in one batch, v-prediction.

2B adds a table of positions to the tokens, which has as many rows for the text as the pipeline pads it to; 5B and 1.5 rotate
queries and keys of the video. Padding is attended. 1.5 also takes two frames of the latents for a token in time: its pipeline
adds frames up to a whole token, and takes them away again. Timesteps are the numbers of discrete ones.

Image to video has the image's latents behind the noise. That of 5B has learned positions for one size and number of frames;
1.5's also embeds `ofs`.
"""

from __future__ import annotations

from typing import Any

import torch

from reelquant.families.family import Arguments, Config, Family, ImageUse, VideoSize
from reelquant.tokens import Grid

NUM_TRAIN_TIMESTEPS = 1000
LARGEST_1_5 = (768, 1360)
"""Height and width of CogVideoX-1.5's videos."""


def _grid(config: Config, call: Arguments) -> Grid:
    _, frames, _, height, width = call["hidden_states"].shape
    patch = config["patch_size"]
    return frames // (config.get("patch_size_t") or 1), height // patch, width // patch


def _inputs(config: Config, size: VideoSize) -> dict[str, Any]:
    patch, patch_t = config["patch_size"], config.get("patch_size_t") or 1
    sample, height, width = (config["sample_height"], config["sample_width"]), size.height, size.width
    frames = -(-size.frames // patch_t) * patch_t
    if config.get("use_learned_positional_embeddings"):  # for other numbers of frames, diffusers takes other ones
        height, width = sample
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    rotary = config.get("use_rotary_positional_embeddings", False)
    sides = height // patch, width // patch
    if config.get("patch_size_t") is not None:  # 1.5 has a table of so many positions, others scale theirs to the video
        sides = min(sides[0], sample[0] // patch), min(sides[1], sample[1] // patch)
    table = frames // patch_t * sides[0] * sides[1], config["attention_head_dim"]
    offset = {"ofs": torch.empty(1) if config.get("ofs_embed_dim") else None}
    has_table = config.get("use_learned_positional_embeddings") or not rotary
    num_text = config["max_text_seq_length"] if has_table else size.num_text
    return {
        "hidden_states": torch.empty(size.batch, frames, config["in_channels"], height, width),
        "timestep": torch.empty(size.batch, dtype=torch.int64),
        "encoder_hidden_states": torch.empty(size.batch, num_text, config["text_embed_dim"]),
        "image_rotary_emb": (torch.empty(table), torch.empty(table)) if rotary else None,
        **({} if size.num_image is None else offset),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _call_defaults(config: Config, side: int) -> dict[str, int]:
    """As the pipeline takes them. 1.5's would be the end of its table of positions; its authors name 1360 x 768 at most."""
    height, width = config["sample_height"] * side, config["sample_width"] * side
    if config.get("patch_size_t") is not None:
        height, width = min(height, LARGEST_1_5[0]), min(width, LARGEST_1_5[1])
    return {"height": height, "width": width, "num_frames": config["sample_frames"]}


def _image(config: Config, _index: Config) -> ImageUse:
    return "none" if config["in_channels"] == config["out_channels"] else "needed"


def _noise_level(timestep: float) -> float:
    return timestep / NUM_TRAIN_TIMESTEPS


def _noise_levels(scheduler: Any, num_steps: int, _num_video: int | None) -> list[float]:
    scheduler.set_timesteps(num_steps)
    return [_noise_level(float(timestep)) for timestep in scheduler.timesteps]


def _image_frame(config: Config, _call: Arguments) -> bool:
    return bool(config["in_channels"] != config["out_channels"])


def _refusal(config: Config) -> str | None:
    given, made = config["in_channels"], config["out_channels"]
    if given in (made, 2 * made):
        return None
    return (
        f"it has {given} input and {made} output channels; supported are {made} (from text) and {2 * made} (from text and an "
        "image)"
    )


FAMILY = Family(
    name="CogVideoX",
    architecture="CogVideoXTransformer3DModel",
    blocks={"transformer_blocks": "num_layers"},
    self_attention="attn1",
    text="before",
    grid=_grid,
    inputs=_inputs,
    noise_level=_noise_level,
    noise_levels=_noise_levels,
    outside={
        "time_embedding.*": "embedder",
        "ofs_embedding.*": "embedder",
        "patch_embed.text_proj": "embedder",
        "norm_out.*": "embedder",
    },
    guidance="batched",
    frames_per_second=8,
    side_multiple=8,
    channel_axis=2,
    joined=(("norm1.linear", "norm2.linear"),),
    call_defaults=_call_defaults,
    refusal=_refusal,
    image=_image,
    image_frame=_image_frame,
)
