"""The parts of the `WanPipeline`, as diffusers' own classes, and their folder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from tools.wan_digits.settings import Settings

LATENT_CHANNELS = 16


def make_vae(settings: Settings, latents_mean: list[float] | None = None, latents_std: list[float] | None = None
             ) -> AutoencoderKLWan:  # fmt: skip
    """4x in time and on both spatial axes, 16 latent channels."""
    return AutoencoderKLWan(
        base_dim=settings.vae_width, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 2], num_res_blocks=1,
        temperal_downsample=[True, True], scale_factor_spatial=4,
        latents_mean=latents_mean or [0.0] * LATENT_CHANNELS, latents_std=latents_std or [1.0] * LATENT_CHANNELS,
    )  # fmt: skip


def make_transformer(settings: Settings) -> WanTransformer3DModel:
    """Patches of 1x2x2 latents; the shared modulation and the output projection start at zero."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=settings.num_heads, attention_head_dim=settings.head_dim,
        in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, text_dim=settings.text_dim, freq_dim=256,
        ffn_dim=settings.ffn_dim, num_layers=settings.num_layers, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    for linear in (model.condition_embedder.time_proj, model.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def build_pipeline(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
) -> WanPipeline:
    """The pipeline with Wan's sampler."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=settings.shift
    )
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a file; it replaces its predecessor whole."""
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial)
    partial.replace(path)


def bf16(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights on the CPU in bfloat16."""
    return {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
