"""The parts of the pipeline that are trained on the GPU, and the folder that holds them all.

`build_pipeline` puts trained or untrained parts together; `save_pipeline` writes the diffusers folder in bfloat16, with
class names that transformers 4 and 5 both know.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import nn

from tools.digits.settings import Settings
from tools.digits.text import TEXT_DIM

LATENT_CHANNELS = 8
COMPRESSION = 4
TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def make_vae(settings: Settings) -> AutoencoderKLHunyuanVideo:
    """4x in time and in both spatial axes, 8 latent channels: both strided levels halve time and space."""
    num_blocks = len(settings.vae_channels)
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * num_blocks,
        up_block_types=("HunyuanVideoUpBlock3D",) * num_blocks,
        block_out_channels=settings.vae_channels,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
        spatial_compression_ratio=COMPRESSION,
        temporal_compression_ratio=COMPRESSION,
        mid_block_add_attention=False,
    )


def make_transformer(settings: Settings) -> HunyuanVideoTransformer3DModel:
    """Patches of 1x2x2 latents; modulation gates and the output projection start at zero (adaLN-Zero)."""
    model = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=settings.num_heads,
        attention_head_dim=settings.head_dim,
        num_layers=settings.num_layers,
        num_single_layers=settings.num_single_layers,
        num_refiner_layers=2,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        rope_axes_dim=settings.rope_axes_dim,
    )
    zeroed = [model.norm_out.linear, model.proj_out]
    zeroed += [block.norm.linear for block in model.single_transformer_blocks]
    for block in model.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for linear in zeroed:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def latent_shape(settings: Settings) -> tuple[int, int, int, int]:
    """(channels, frames, height, width) of one clip's latent."""
    frames = (settings.num_frames - 1) // COMPRESSION + 1
    return LATENT_CHANNELS, frames, settings.height // COMPRESSION, settings.width // COMPRESSION


def build_pipeline(
    settings: Settings,
    text: HunyuanVideoPipeline,
    vae: AutoencoderKLHunyuanVideo | None = None,
    transformer: HunyuanVideoTransformer3DModel | None = None,
) -> HunyuanVideoPipeline:
    """A pipeline with the text side of `text`; parts that are not given are fresh and untrained."""
    return HunyuanVideoPipeline(
        **{name: getattr(text, name) for name in TEXT_PARTS},
        vae=vae or make_vae(settings),
        transformer=transformer or make_transformer(settings),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=settings.shift),
    )


def load_text_side(folder: Path) -> HunyuanVideoPipeline:
    """A pipeline of the text parts alone, from a folder that `save_pipeline` wrote."""
    return HunyuanVideoPipeline.from_pretrained(folder, vae=None, transformer=None, scheduler=None)


def save_pipeline(pipe: HunyuanVideoPipeline, folder: Path) -> None:
    """Writes `folder` with every model in bfloat16 (the pipeline in memory is converted too)."""
    pipe.to(dtype=torch.bfloat16)
    pipe.save_pretrained(folder, safe_serialization=True)
    keep_old_names(folder)


def keep_old_names(folder: Path) -> None:
    """Makes a pipeline's folder loadable by transformers 4 too, and takes the name of its origin out."""
    # transformers 5 writes the new name of the same class, which transformers 4 does not have.
    for path in (folder / "model_index.json", *folder.glob("tokenizer*/tokenizer_config.json")):
        path.write_text(path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("_name_or_path", None)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
