"""Narrow blocks of HunyuanVideo, one of each kind, and calls of them as they are recorded."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoRotaryPosEmbed,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from torch import Tensor, nn

from reelquant.calibration.block_call import BlockCall, Constants, Streams
from reelquant.calibration.input_groups import block_calls
from reelquant.families.hunyuan_video import FAMILY
from reelquant.settings.generation import LayerBits
from reelquant.tokens import TokenLayout

BLOCKS = ("transformer_blocks.0", "single_transformer_blocks.0")


def config_of(**changes: Any) -> dict[str, Any]:
    """Of a transformer with two blocks, 32 wide."""
    return {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
        "num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 2.0, "qk_norm": "rms_norm", "text_embed_dim": 12,
        "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6), "rope_theta": 256.0, "patch_size": 2, "patch_size_t": 1,
        "guidance_embeds": True, **changes,
    }  # fmt: skip


def calls_of(config: dict[str, Any]) -> dict[str, BlockCall]:
    return block_calls(FAMILY, config)


def new_block(config: dict[str, Any], name: str) -> nn.Module:
    """A block with random weights."""
    kind = HunyuanVideoTransformerBlock if name == BLOCKS[0] else HunyuanVideoSingleTransformerBlock
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    block: nn.Module = kind(heads, size, mlp_ratio=config["mlp_ratio"], qk_norm=config["qk_norm"])
    return block.eval()


def layout_of(config: dict[str, Any], latents: tuple[int, ...], num_text: int) -> TokenLayout:
    return FAMILY.layout(config, {"hidden_states": torch.empty(1, *latents)}, num_text)


def streams_of(stream: Tensor, layout: TokenLayout) -> Streams:
    """Both streams of `[L, d]`."""
    video, text = stream[: layout.num_video], stream[layout.num_video :]
    return {"hidden_states": video.unsqueeze(0), "encoder_hidden_states": text.unsqueeze(0)}


def constants_of(config: dict[str, Any], layout: TokenLayout, temb: Tensor) -> Constants:
    """What both blocks read besides, for `temb [1, d]`; rotary tables in float32."""
    rope = HunyuanVideoRotaryPosEmbed(1, 1, list(config["rope_axes_dim"]), config["rope_theta"])
    rotary = rope(torch.empty(1, 1, layout.num_frames, layout.height, layout.width))
    calls = {
        "transformer_blocks": {"temb": temb, "freqs_cis": rotary},
        "single_transformer_blocks": {"temb": temb, "image_rotary_emb": rotary},
    }
    return Constants(calls, layout)


def bits_of(name: str, weight: int = 4, activation: int = 6) -> dict[str, LayerBits]:
    """Of all layers of a block; the modulation's activations stay as they are."""
    levels = calls_of(config_of())[name].levels
    return {
        layer: LayerBits(weight, 16 if group.stream == "conditioning" else activation)
        for group in (group for level in levels for group in level)
        for layer in group.layers
    }
