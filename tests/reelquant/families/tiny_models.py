"""Tiny random transformers of every family and their variants."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from reelquant.families.cogvideox import FAMILY as COGVIDEOX
from reelquant.families.family import Family
from reelquant.families.hunyuan_video import FAMILY as HUNYUAN_VIDEO
from reelquant.families.hunyuan_video_15 import FAMILY as HUNYUAN_VIDEO_15
from reelquant.families.ltx_video import FAMILY as LTX_VIDEO
from reelquant.families.mochi import FAMILY as MOCHI
from reelquant.families.wan import FAMILY as WAN


@dataclass(frozen=True)
class Tiny:
    """A family and how to make one of its models and a call of it."""

    family: Family
    settings: dict[str, Any]
    call: Callable[[], dict[str, Any]]
    scheduler: Any
    num_grouped: int
    """Linears of a block that share their input with another one."""

    def model(self) -> Any:
        torch.manual_seed(0)
        built = getattr(diffusers, self.family.architecture)(**self.settings).eval().requires_grad_(False)
        for parameter in built.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2
        return built


def _text(length: int, width: int) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(1, length, width), "return_dict": False}


_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}
_UNIPC = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
FIRST_FRAME = torch.arange(3 * 16).reshape(1, -1) < 16
"""Of the latents of a tiny TI2V model: their tokens."""


def _angles(num: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(num, width // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


_HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 12,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def _hunyuan_video_call(channels: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, channels, 3, 6, 10),
        "timestep": torch.tensor([700.0]),
        **_text(8, 12),
        "encoder_attention_mask": torch.ones(1, 8),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
    }


_HUNYUAN_VIDEO_15 = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "text_embed_2_dim": 8,
    "image_embed_dim": 12,
    "rope_axes_dim": (2, 6, 8),
    "target_size": 16,
    "task_type": "t2v",
}


def _hunyuan_video_15_call(image: torch.Tensor) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 9, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        **_text(6, 16),
        "encoder_attention_mask": (torch.arange(6) < 5).float().unsqueeze(0),
        "encoder_hidden_states_2": torch.randn(1, 4, 8),
        "encoder_attention_mask_2": torch.zeros(1, 4),
        "image_embeds": image,
    }


_COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "num_layers": 3,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 8,
}
_COGVIDEOX_15 = {
    **_COGVIDEOX,
    "patch_size_t": 2,
    "patch_bias": False,
    "use_rotary_positional_embeddings": True,
    "sample_frames": 17,
    "sample_width": 12,
}
TINY = {
    "HunyuanVideo": Tiny(
        HUNYUAN_VIDEO,
        _HUNYUAN_VIDEO,
        lambda: _hunyuan_video_call(4),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        8,
    ),
    "HunyuanVideo latent_concat": Tiny(
        HUNYUAN_VIDEO,
        {**_HUNYUAN_VIDEO, "in_channels": 9, "image_condition_type": "latent_concat"},
        lambda: _hunyuan_video_call(9),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        8,
    ),
    "HunyuanVideo token_replace": Tiny(
        HUNYUAN_VIDEO,
        {**_HUNYUAN_VIDEO, "image_condition_type": "token_replace"},
        lambda: _hunyuan_video_call(4),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        8,
    ),
    "HunyuanVideo-1.5": Tiny(
        HUNYUAN_VIDEO_15,
        _HUNYUAN_VIDEO_15,
        lambda: _hunyuan_video_15_call(torch.zeros(1, 3, 12)),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        8,
    ),
    "HunyuanVideo-1.5 from an image": Tiny(
        HUNYUAN_VIDEO_15,
        {**_HUNYUAN_VIDEO_15, "task_type": "i2v"},
        lambda: _hunyuan_video_15_call(torch.randn(1, 3, 12)),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        8,
    ),
    "Wan": Tiny(
        WAN,
        _WAN,
        lambda: {"hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor([500]), **_text(7, 16)},
        _UNIPC,
        5,
    ),
    "Wan 2.1 I2V": Tiny(
        WAN,
        {**_WAN, "in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24},
        lambda: {
            "hidden_states": torch.randn(1, 12, 3, 8, 8),
            "timestep": torch.tensor([500]),
            **_text(512, 16),
            "encoder_hidden_states_image": torch.randn(1, 6, 8),
        },
        _UNIPC,
        7,
    ),
    "Wan 2.2 I2V": Tiny(
        WAN,
        {**_WAN, "in_channels": 12},
        lambda: {"hidden_states": torch.randn(1, 12, 3, 8, 8), "timestep": torch.tensor([500]), **_text(7, 16)},
        _UNIPC,
        5,
    ),
    "Wan TI2V": Tiny(
        WAN,
        _WAN,
        lambda: {
            "hidden_states": torch.randn(1, 4, 3, 8, 8),
            "timestep": torch.where(FIRST_FRAME, 0.0, 500.0),
            **_text(7, 16),
        },
        _UNIPC,
        5,
    ),
    "CogVideoX": Tiny(
        COGVIDEOX,
        _COGVIDEOX,
        lambda: {"hidden_states": torch.randn(1, 3, 4, 8, 8), "timestep": torch.tensor([500]), **_text(8, 8)},
        diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing"),
        5,
    ),
    "CogVideoX-1.5": Tiny(
        COGVIDEOX,
        _COGVIDEOX_15,
        lambda: {
            "hidden_states": torch.randn(1, 4, 4, 8, 10),
            "timestep": torch.tensor([500]),
            "image_rotary_emb": _angles(2 * 4 * 5, 16),
            **_text(7, 8),
        },
        diffusers.CogVideoXDPMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
        5,
    ),
    "CogVideoX-5B from an image": Tiny(
        COGVIDEOX,
        {
            **_COGVIDEOX,
            "in_channels": 8,
            "use_rotary_positional_embeddings": True,
            "use_learned_positional_embeddings": True,
            "sample_width": 12,
        },
        lambda: {
            "hidden_states": torch.randn(1, 3, 8, 8, 12),
            "timestep": torch.tensor([500]),
            "image_rotary_emb": _angles(3 * 4 * 6, 16),
            "ofs": None,
            **_text(8, 8),
        },
        diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
        5,
    ),
    "CogVideoX-1.5 from an image": Tiny(
        COGVIDEOX,
        {**_COGVIDEOX_15, "in_channels": 8, "ofs_embed_dim": 8},
        lambda: {
            "hidden_states": torch.randn(1, 4, 8, 8, 10),
            "timestep": torch.tensor([500]),
            "image_rotary_emb": _angles(2 * 4 * 5, 16),
            "ofs": torch.tensor([2.0]),
            **_text(7, 8),
        },
        diffusers.CogVideoXDPMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
        5,
    ),
    "LTX-Video": Tiny(
        LTX_VIDEO,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 3,
            "caption_channels": 16,
        },
        lambda: {
            "hidden_states": torch.randn(1, 2 * 4 * 5, 4),
            "timestep": torch.tensor([500.0]),
            **_text(7, 16),
            "encoder_attention_mask": torch.ones(1, 7),
            "num_frames": 2,
            "height": 4,
            "width": 5,
        },
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        5,
    ),
    "Mochi": Tiny(
        MOCHI,
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "qk_norm": "rms_norm",
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "activation_fn": "swiglu",
            "max_sequence_length": 8,
        },
        lambda: {
            "hidden_states": torch.randn(1, 4, 2, 8, 10),
            "timestep": torch.tensor([500.0]),
            **_text(8, 16),
            "encoder_attention_mask": torch.ones(1, 8).bool(),
        },
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        8,
    ),
}
