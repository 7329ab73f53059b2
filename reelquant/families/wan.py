"""Wan 2.1 and 2.2: self-attention over the video alone, cross-attention to text and image, modulation by a table.

| model | image | timestep |
|---|---|---|
| text to video | none | one a video |
| 2.1 image to video | latents and mask beside the noise; tokens of an image encoder in front of the text | one a video |
| 2.2 image to video | latents and mask beside the noise | one a video |
| 2.2 TI2V-5B | none, or latents in place of the first frame's | one a token; 0 for those of the image |

Text is padded with zeros, which are attended. Guidance takes two passes. Wan2.2-A14B has a transformer for the noisy steps and
another one for the rest; both are built alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reelquant.families.attention_core import WatchingCore, attention_core, plain_core
from reelquant.families.family import Arguments, Config, Family, ImageUse, VideoSize
from reelquant.tokens import Grid

NUM_TRAIN_TIMESTEPS = 1000
TEXT_BEHIND_IMAGE = 512
"""Text tokens that attention takes from the end of the image's and the text's, whatever there are (`WanAttnProcessor`)."""
MASK_CHANNELS = 4
"""In the input of image-to-video models, beside the noise and the image's latents."""


def _patched(config: Config, sizes: tuple[int, ...]) -> Grid:
    frames, height, width = (size // patch for size, patch in zip(sizes, config["patch_size"], strict=True))
    return frames, height, width


def _grid(config: Config, call: Arguments) -> Grid:
    return _patched(config, call["hidden_states"].shape[-3:])


def _inputs(config: Config, size: VideoSize) -> dict[str, Any]:
    sizes, image_dim = (size.frames, size.height, size.width), config.get("image_dim")
    timesteps = (size.batch, math.prod(_patched(config, sizes)))
    num_text = size.num_text if image_dim is None else TEXT_BEHIND_IMAGE
    image = None if image_dim is None else torch.empty(size.batch, size.num_image or 0, image_dim)
    return {
        "hidden_states": torch.empty(size.batch, config["in_channels"], *sizes),
        "timestep": torch.empty(timesteps) if size.token_timesteps else torch.empty(size.batch, dtype=torch.int64),
        "encoder_hidden_states": torch.empty(size.batch, num_text, config["text_dim"]),
        **({} if size.num_image is None else {"encoder_hidden_states_image": image}),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _noise_level(timestep: float) -> float:
    return timestep / NUM_TRAIN_TIMESTEPS


def _noise_levels(scheduler: Any, num_steps: int, _num_video: int | None) -> list[float]:
    scheduler.set_timesteps(num_steps)
    return [_noise_level(float(timestep)) for timestep in scheduler.timesteps]


def _image(config: Config, index: Config) -> ImageUse:
    if config["in_channels"] != config["out_channels"]:
        return "needed"
    return "optional" if index.get("expand_timesteps") else "none"


def _image_frame(_config: Config, call: Arguments) -> bool:
    return "encoder_hidden_states_image" in call  # by the pipeline from an image alone, None or not


def _refusal(config: Config) -> str | None:
    given, made = config["in_channels"], config["out_channels"]
    if given not in (made, 2 * made + MASK_CHANNELS):
        return (
            f"it has {given} input and {made} output channels; supported are {made} (from text) and "
            f"{2 * made + MASK_CHANNELS} (from text and an image)"
        )
    if config.get("pos_embed_seq_len") is not None:
        return "it makes a video from its first and last frame (pos_embed_seq_len); supported are models from one image"
    return None


def _rows(block: Any, call: Arguments, rows: Tensor) -> Tensor:
    """`WanTransformerBlock.forward` for the queries at `rows` alone; everything behind the self-attention is token by token."""
    hidden, temb = call["hidden_states"], call["temb"].float()
    # [1, 6, d], or [1, L, 6, d] with timesteps of tokens
    table = block.scale_shift_table + (temb if temb.ndim == 4 else temb.unsqueeze(1))
    shift, scale, gate, *later = table.unbind(2)
    inputs = (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    gate, shift_mlp, scale_mlp, gate_mlp = (
        part.index_select(1, rows) if part.shape[1] > 1 else part for part in (gate, *later)
    )
    stream = hidden.index_select(1, rows)
    stream = (stream.float() + _attended(block, inputs, call["rotary_emb"], rows) * gate).type_as(hidden)
    stream = stream + block.attn2(
        block.norm2(stream.float()).type_as(hidden), call["encoder_hidden_states"], None, None
    )
    inner = (block.norm3(stream.float()) * (1 + scale_mlp) + shift_mlp).type_as(hidden)
    out: Tensor = (stream.float() + block.ffn(inner).float() * gate_mlp).type_as(hidden)
    return out


def _attended(block: Any, inputs: Tensor, rotary: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """Self-attention of `[1, L, d]` at `rows`, `[1, R, d]`; all queries are made only where somebody watches them."""
    attn, core = block.attn1, attention_core(FAMILY, block) or plain_core
    watched = isinstance(core, WatchingCore)
    asked = inputs if watched else inputs.index_select(1, rows)
    query = _rotated(attn.norm_q(attn.to_q(asked)), rotary, attn.heads, None if watched else rows)
    key = _rotated(attn.norm_k(attn.to_k(inputs)), rotary, attn.heads, None)
    value = attn.to_v(inputs).unflatten(2, (attn.heads, -1))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if isinstance(core, WatchingCore):
        core, q = core.watched(q, k, v), q.index_select(1, rows)
    out = core(0, q, k, v).transpose(0, 1).flatten(1).unsqueeze(0)
    result: Tensor = attn.to_out[1](attn.to_out[0](out.type_as(query)))
    return result


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor], heads: int, rows: Tensor | None) -> Tensor:
    """`[1, L, d]` to heads `[1, L, H, D]`, turned in pairs of channels by tables `[1, L, 1, D]` at `rows`."""
    cos, sin = (table if rows is None else table.index_select(1, rows) for table in rotary)
    even, odd = x.unflatten(2, (heads, -1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


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
    image=_image,
    image_frame=_image_frame,
    token_timesteps="expand_timesteps",
    token_rows=("temb",),
    frames_per_second=16,
    side_multiple=16,
    refusal=_refusal,
    rows=_rows,
)
