"""Whole pipelines with tiny random models, as diffusers folders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from reelquant.families.hunyuan_video_15 import prompt_template
from tests.reelquant.families.tiny_models import TINY

TOKENIZER = Path(__file__).resolve().parents[3] / "assets" / "hunyuanvideo-digits" / "tokenizer"


def _text_parts(width: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {"tokenizer": tokenizer, "text_encoder": T5EncoderModel(config)}


def ltx_video(folder: Path) -> Path:
    """An `LTXPipeline`; its VAE compresses four times in time and on a side."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1, 1, 1, 1), patch_size=1,
        encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    diffusers.LTXPipeline(
        scheduler=TINY["LTX-Video"].scheduler, vae=vae, transformer=TINY["LTX-Video"].model(), **_text_parts(16)
    ).save_pretrained(folder)
    return folder


def mochi(folder: Path) -> Path:
    """A `MochiPipeline`, whose empty prompt has no tokens at all."""
    torch.manual_seed(0)
    channels = {"in_channels": 12, "out_channels": 12}  # the pipeline knows no others
    transformer = replace(TINY["Mochi"], settings={**TINY["Mochi"].settings, **channels}).model()
    vae = diffusers.AutoencoderKLMochi(
        out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    diffusers.MochiPipeline(
        scheduler=TINY["Mochi"].scheduler, vae=vae, transformer=transformer, force_zeros_for_empty_prompt=True,
        **_text_parts(16),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _wan_parts(name: str, heads: int) -> dict[str, Any]:
    """Parts of a Wan pipeline; its VAE compresses four times in time and eight on a side."""
    torch.manual_seed(0)
    tiny = TINY[name]
    widths = {"added_kv_proj_dim": 12 * heads} if "added_kv_proj_dim" in tiny.settings else {}
    tiny = replace(tiny, settings={**tiny.settings, "num_attention_heads": heads, **widths})
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    first, second = tiny.model(), tiny.model()
    for parameter in second.parameters():
        parameter.data = parameter.data * 0.9
    return {
        "tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(config), "vae": vae, "scheduler": tiny.scheduler,
        "transformer": first, "transformer_2": second,
    }  # fmt: skip


def wan(folder: Path, *, boundary: float | None = None) -> Path:
    """A `WanPipeline`; with a boundary one of two transformers, as Wan2.2-A14B."""
    parts = _wan_parts("Wan", heads=4)
    if boundary is None:
        parts["transformer_2"] = None
    diffusers.WanPipeline(**parts, boundary_ratio=boundary).save_pretrained(folder)
    return folder


def wan_2_1_i2v(folder: Path) -> Path:
    """A `WanImageToVideoPipeline` with an image encoder, which makes five tokens."""
    parts = _wan_parts("Wan 2.1 I2V", heads=4)
    encoder = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    image = {"image_encoder": CLIPVisionModel(encoder), "image_processor": processor}
    diffusers.WanImageToVideoPipeline(**{**parts, "transformer_2": None}, **image).save_pretrained(folder)
    return folder


def wan_2_2_i2v(folder: Path) -> Path:
    """A `WanImageToVideoPipeline` of two transformers without an image encoder."""
    diffusers.WanImageToVideoPipeline(**_wan_parts("Wan 2.2 I2V", heads=4), boundary_ratio=0.8).save_pretrained(folder)
    return folder


def wan_ti2v(folder: Path, *, image: bool = True) -> Path:
    """A `WanImageToVideoPipeline` whose tokens have timesteps of their own, or a `WanPipeline` of the same model."""
    parts = {**_wan_parts("Wan TI2V", heads=4), "transformer_2": None}
    pipeline_class = diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline
    pipeline_class(**parts, expand_timesteps=True).save_pretrained(folder)
    return folder


def wan_2_2(folder: Path) -> Path:
    """Two transformers, of which the second serves the second half of four steps."""
    return wan(folder, boundary=0.8)


def hunyuan_video_i2v(folder: Path, condition: str = "token_replace") -> Path:
    """A `HunyuanVideoImageToVideoPipeline`, whose text encoder reads 576 tokens of an image; its VAE compresses four times in
    time and eight on a side."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=1024,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    llava = LlavaConfig(
        text_config=llama, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    tiny = TINY[f"HunyuanVideo {condition}"]
    diffusers.HunyuanVideoImageToVideoPipeline(
        text_encoder=LlavaForConditionalGeneration(llava), tokenizer=tokenizer, text_encoder_2=CLIPTextModel(clip),
        tokenizer_2=tokenizer, transformer=tiny.model(), vae=vae, scheduler=tiny.scheduler, image_processor=processor,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def hunyuan_video_i2v_concat(folder: Path) -> Path:
    """The image's latents behind the noise; the pipeline leaves four frames out."""
    return hunyuan_video_i2v(folder, "latent_concat")


def hunyuan_video_15(folder: Path, *, image: bool = False) -> Path:
    """A `HunyuanVideo15Pipeline`, whose instruction has more tokens than the pipeline cuts off; its VAE compresses four times
    in time and eight on a side."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1, spatial_compression_ratio=8
    )
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    before, after = prompt_template({}).text.split("{}")
    tokenizer.chat_template = f"{before}{{{{ messages[1]['content'] }}}}{after}"
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    byt5 = T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    parts: dict[str, Any] = {}
    if image:
        siglip = SiglipVisionConfig(
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        processor = SiglipImageProcessor(size={"height": 16, "width": 16})
        parts = {"image_encoder": SiglipVisionModel(siglip), "feature_extractor": processor}
    kind = diffusers.HunyuanVideo15ImageToVideoPipeline if image else diffusers.HunyuanVideo15Pipeline
    tiny = TINY["HunyuanVideo-1.5 from an image" if image else "HunyuanVideo-1.5"]
    kind(
        text_encoder=Qwen2_5_VLTextModel(qwen), tokenizer=tokenizer, text_encoder_2=T5EncoderModel(byt5),
        tokenizer_2=ByT5Tokenizer(), transformer=tiny.model(), vae=vae, scheduler=tiny.scheduler,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0), **parts,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def hunyuan_video_15_i2v(folder: Path) -> Path:
    """A `HunyuanVideo15ImageToVideoPipeline`, whose image encoder makes four tokens of an image."""
    return hunyuan_video_15(folder, image=True)


def cogvideox(folder: Path, variant: str = "CogVideoX") -> Path:
    """A `CogVideoXPipeline`; its VAE compresses four times in time and twice on a side."""
    torch.manual_seed(0)
    kinds = {f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 3 for way in ("down", "up")}
    vae = diffusers.AutoencoderKLCogVideoX(
        **kinds, latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=2,
        sample_height=128, sample_width=128, scaling_factor=0.7,
    )  # fmt: skip
    tiny = TINY[variant]
    # The pipeline writes positions for the sizes that it is told.
    settings = {**tiny.settings, "max_text_seq_length": 16}
    kind = diffusers.CogVideoXImageToVideoPipeline if "image" in variant else diffusers.CogVideoXPipeline
    kind(
        vae=vae, transformer=replace(tiny, settings=settings).model(), scheduler=tiny.scheduler, **_text_parts(8)
    ).save_pretrained(folder)
    return folder


def cogvideox_1_5(folder: Path) -> Path:
    """Rotary positions, two latent frames a token, and a scheduler that draws noise."""
    return cogvideox(folder, "CogVideoX-1.5")


def cogvideox_1_5_i2v(folder: Path) -> Path:
    """The image's latents behind the noise; they are drawn from the VAE's distribution."""
    return cogvideox(folder, "CogVideoX-1.5 from an image")


def cogvideox_5b_i2v(folder: Path) -> Path:
    """Learned positions: one size of videos."""
    return cogvideox(folder, "CogVideoX-5B from an image")
