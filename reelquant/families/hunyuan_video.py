"""HunyuanVideo: which blocks there are, which linears share an input, how tokens are laid out, how one block is called.

Every family module has the same names: `ARCHITECTURE`, `block_names`, `build_block`, `group_levels`, `auxiliary_kind`,
`token_layout`, `rotary_embedding`, `Conditioning`, `call_block`, `conditioning_input`, `watch_attention`,
`set_attention_core`, `num_heads`, `output_layers`, `noise_level`, `noise_levels`; where its blocks can run fused, also
`fusion_obstacle` and `fused_forward`; where a part of a block's tokens can be computed alone, also `call_block_rows`.

A stream is one tensor `[L, d]` of one sample: the video tokens in frame-major order, then the text tokens without padding.
Padding is masked as a key everywhere in the model, so dropping it changes no real token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoRotaryPosEmbed,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import retrieve_timesteps
from torch import Tensor, nn

from reelquant.families.family import InputGroup, OutputLayer
from reelquant.families.hunyuan_video_attention import prepare_core, set_attention_core, watch_attention
from reelquant.families.hunyuan_video_fused import fused_forward, fusion_obstacle
from reelquant.families.hunyuan_video_rows import block_rows
from reelquant.tokens import TokenLayout

__all__ = [
    "ARCHITECTURE",
    "Conditioning",
    "auxiliary_kind",
    "block_names",
    "build_block",
    "call_block",
    "call_block_rows",
    "conditioning_input",
    "fused_forward",
    "fusion_obstacle",
    "group_levels",
    "noise_level",
    "noise_levels",
    "num_heads",
    "output_layers",
    "rotary_embedding",
    "set_attention_core",
    "token_layout",
    "watch_attention",
]

ARCHITECTURE = "HunyuanVideoTransformer3DModel"

NUM_TRAIN_TIMESTEPS = 1000

_DOUBLE = "transformer_blocks"
_SINGLE = "single_transformer_blocks"

_DOUBLE_LEVELS = (
    (InputGroup("modulation", "conditioning", ("norm1.linear", "norm1_context.linear")),),
    (
        InputGroup("attention_in", "video", ("attn.to_q", "attn.to_k", "attn.to_v")),
        InputGroup("attention_in_context", "text", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ),
    (
        InputGroup("attention_out", "video", ("attn.to_out.0",)),
        InputGroup("attention_out_context", "text", ("attn.to_add_out",)),
    ),
    (
        InputGroup("feed_forward_in", "video", ("ff.net.0.proj",)),
        InputGroup("feed_forward_in_context", "text", ("ff_context.net.0.proj",)),
    ),
    (
        InputGroup("feed_forward_out", "video", ("ff.net.2",)),
        InputGroup("feed_forward_out_context", "text", ("ff_context.net.2",)),
    ),
)
_SINGLE_LEVELS = (
    (InputGroup("modulation", "conditioning", ("norm.linear",)),),
    (InputGroup("block_in", "joint", ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v")),),
    (InputGroup("block_out", "joint", ("proj_out",)),),
)

_DOUBLE_OUTPUTS = (
    (OutputLayer("attn.to_out.0", "video", ("norm1", 1)), OutputLayer("attn.to_add_out", "text", ("norm1_context", 1))),
    (OutputLayer("ff.net.2", "video", ("norm1", 4)), OutputLayer("ff_context.net.2", "text", ("norm1_context", 4))),
)
_SINGLE_OUTPUTS = ((OutputLayer("proj_out", "joint", ("norm", 1)),),)


@dataclass(frozen=True)
class Conditioning:
    """What a block reads besides its stream: `temb [1, d]`, the rotary tables `[L_video, head_dim]` and the token grid."""

    temb: Tensor
    rotary: tuple[Tensor, Tensor]
    layout: TokenLayout
    attention_residual: Tensor | None = None
    """`[H, L, D]`: what a calibration core adds to its sparse attention."""

    @property
    def num_text(self) -> int:
        """Number of text tokens."""
        return self.layout.num_text

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """The same on `device`; the rotary tables stay float32."""
        cos, sin = self.rotary
        residual = None if self.attention_residual is None else self.attention_residual.to(device, dtype)
        return Conditioning(self.temb.to(device, dtype), (cos.to(device), sin.to(device)), self.layout, residual)


def block_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the blocks in the order in which the model runs them, for a transformer's `config.json`."""
    double = (f"{_DOUBLE}.{i}" for i in range(config["num_layers"]))
    single = (f"{_SINGLE}.{i}" for i in range(config["num_single_layers"]))
    return (*double, *single)


def num_heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Number and size of the attention heads."""
    return config["num_attention_heads"], config["attention_head_dim"]


def noise_level(timestep: float) -> float:
    """Noise level in [0, 1] of a timestep that the pipeline hands to the transformer."""
    return timestep / NUM_TRAIN_TIMESTEPS


def noise_levels(scheduler: Any, num_steps: int) -> list[float]:
    """Noise levels of a generation with `num_steps` steps, as the family's pipeline asks `scheduler` for them.

    Raises:
        ValueError: the scheduler takes no sigmas.
    """
    sigmas = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
    timesteps, _ = retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=sigmas)
    return [noise_level(float(timestep)) for timestep in timesteps]


def build_block(config: Mapping[str, Any], name: str) -> nn.Module:
    """A block of the family without its weights; build it under `torch.device("meta")` to allocate nothing.

    Raises:
        ValueError: the model has no block `name`, or a kind of block that is not supported.
    """
    names = block_names(config)
    if name not in names:
        doubles, singles = config["num_layers"], config["num_single_layers"]
        raise ValueError(
            f"no block {name!r}: this HunyuanVideo has {_DOUBLE}.0-{doubles - 1} and {_SINGLE}.0-{singles - 1}"
        )
    if config.get("image_condition_type") is not None:
        raise ValueError(
            f"image_condition_type {config['image_condition_type']!r} (image-to-video) is not supported; "
            "use the text-to-video model, whose image_condition_type is null"
        )
    block_class = HunyuanVideoTransformerBlock if name.startswith(f"{_DOUBLE}.") else HunyuanVideoSingleTransformerBlock
    block: nn.Module = block_class(
        config["num_attention_heads"],
        config["attention_head_dim"],
        mlp_ratio=config["mlp_ratio"],
        qk_norm=config["qk_norm"],
    )
    return block


def group_levels(name: str) -> tuple[tuple[InputGroup, ...], ...]:
    """Input groups of block `name`, level by level: a level's inputs depend only on the layers of the levels before it."""
    return _DOUBLE_LEVELS if name.startswith(f"{_DOUBLE}.") else _SINGLE_LEVELS


def output_layers(name: str) -> tuple[tuple[OutputLayer, ...], ...]:
    """Layers of block `name` that are added to the stream, in the order in which they are: what they add up to is the
    block's output less its input. Those of one level do not depend on each other."""
    return _DOUBLE_OUTPUTS if name.startswith(f"{_DOUBLE}.") else _SINGLE_OUTPUTS


def auxiliary_kind(layer: str) -> str | None:
    """`"refiner"` or `"embedder"` for a linear outside the blocks, None for one that stays in 16 bits (output projection)."""
    if ".refiner_blocks." in layer:
        return "refiner"
    if layer.startswith(("time_text_embed.", "context_embedder.", "norm_out.")):
        return "embedder"
    return None


def token_layout(config: Mapping[str, Any], latent_shape: tuple[int, ...], num_text: int) -> TokenLayout:
    """Token grid of latents `[..., C, F, H, W]` and `num_text` text tokens."""
    frames, height, width = latent_shape[-3:]
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    return TokenLayout(frames // patch_t, height // patch, width // patch, num_text)


def rotary_embedding(config: Mapping[str, Any], layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, float32 `[L_video, head_dim]`."""
    rope = HunyuanVideoRotaryPosEmbed(1, 1, list(config["rope_axes_dim"]), config["rope_theta"])
    cos, sin = rope(torch.empty(1, 1, layout.num_frames, layout.height, layout.width))
    return cos, sin


def call_block(block: nn.Module, hidden: Tensor, conditioning: Conditioning) -> Tensor:
    """Runs one block on one stream: `[L, d] -> [L, d]`, without the rest of the model.

    Raises:
        ValueError: there is no text token; diffusers' blocks need one.
    """
    _check_text(conditioning)
    prepare_core(block, conditioning)
    num_video = len(hidden) - conditioning.num_text
    video, text = hidden[:num_video].unsqueeze(0), hidden[num_video:].unsqueeze(0)
    video, text = block(video, text, conditioning.temb, None, conditioning.rotary)
    return torch.cat([video[0], text[0]])


def call_block_rows(block: nn.Module, hidden: Tensor, conditioning: Conditioning, rows: Tensor) -> Tensor:
    """`call_block(...)[rows]`, computed for these tokens alone: `[L, d] -> [R, d]`.

    Args:
        rows: int64 `[R]`, some video tokens and after them all text tokens. An attention core must take fewer queries than
            keys: dense attention does, a band does not.

    Raises:
        ValueError: there is no text token; diffusers' blocks need one.
    """
    _check_text(conditioning)
    prepare_core(block, conditioning)
    return block_rows(block, hidden.unsqueeze(0), conditioning.temb, rotary=conditioning.rotary, rows=rows)[0]


def _check_text(conditioning: Conditioning) -> None:
    if conditioning.num_text < 1:
        raise ValueError("a sample has 0 text tokens: HunyuanVideo's blocks need at least 1; give it a prompt")


def conditioning_input(temb: Tensor) -> Tensor:
    """What the modulation layers read, for `temb [M, d]`."""
    return nn.functional.silu(temb)
