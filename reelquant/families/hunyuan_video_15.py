"""HunyuanVideo-1.5: HunyuanVideo's double-stream block alone, text of two encoders, guidance in two passes by a guider.

The model packs `[image, glyphs (ByT5), text (Qwen2.5-VL), padding]` behind the video, and reads the image's latents and a mask
behind the noise. In text to video all of the image is zeros, and its states are masked. Padding is masked on both sides, so
dropping it changes no real token. Distilled models have the same transformer and are called once a step, without guidance;
that of mean flow (`use_meanflow`) also embeds `timestep_r`, which diffusers' pipeline hands it from an image alone.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import HunyuanVideo15Pipeline, extract_glyph_texts
from torch import Tensor

from reelquant.families.attention_core import plain_core
from reelquant.families.family import (
    Arguments,
    AttentionCore,
    Config,
    Family,
    FusedBlock,
    ImageUse,
    PromptTemplate,
    SecondText,
    VideoSize,
)
from reelquant.families.hunyuan_video import FAMILY as HUNYUAN_VIDEO
from reelquant.families.hunyuan_video_attention import CoreAttentionProcessor
from reelquant.families.hunyuan_video_fused import fused_forward, fusion_obstacle
from reelquant.tokens import Grid

GLYPH_TOKENS = 256
"""To which the pipeline pads them (`tokenizer_2_max_length`)."""
_PROMPT = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
_CHAT = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n"


def _grid(config: Config, call: Arguments) -> Grid:
    frames, height, width = call["hidden_states"].shape[-3:]
    patch = config["patch_size"]
    return frames // config["patch_size_t"], height // patch, width // patch


def _inputs(config: Config, size: VideoSize) -> dict[str, Any]:
    """Padding left out."""
    batch, text, glyphs = size.batch, (size.batch, size.num_text), (size.batch, size.num_second_text)
    return {
        "hidden_states": torch.empty(batch, config["in_channels"], size.frames, size.height, size.width),
        "timestep": torch.empty(batch),
        "encoder_hidden_states": torch.empty(*text, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(text),
        "encoder_hidden_states_2": torch.empty(*glyphs, config["text_embed_2_dim"]),
        "encoder_attention_mask_2": torch.ones(glyphs),
        "image_embeds": torch.empty(batch, size.num_image or 0, config["image_embed_dim"]),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _call_defaults(config: Config, side: int) -> dict[str, int]:
    """Of a video, or an image, of 16:9."""
    processor = HunyuanVideo15ImageProcessor(vae_scale_factor=side)
    height, width = processor.calculate_default_height_width(9, 16, config.get("target_size", 640))
    return {"height": height, "width": width, "max_sequence_length": _PROMPT["tokenizer_max_length"].default}


def _image(_config: Config, index: Config) -> ImageUse:
    return "needed" if "ImageToVideo" in index["_class_name"] else "none"


def _image_frame(_config: Config, call: Arguments) -> bool:
    return bool(call["image_embeds"].shape[1])  # dropped where there is no image


def _refusal(config: Config) -> str | None:
    head_dim, table = config["attention_head_dim"], sum(config["rope_axes_dim"])
    if table != head_dim:
        return f"attention heads have {head_dim} channels, but its rotary tables have {table}: they must be equal"
    return None


def _glyphs(prompt: str) -> str | None:
    """The words in quotes, which ByT5 reads letter by letter."""
    found: str | None = extract_glyph_texts(prompt)
    return found


def prompt_template(_config: Config) -> PromptTemplate:
    """The chat around a prompt."""
    return PromptTemplate(_CHAT.format(system=_PROMPT["system_message"].default), _PROMPT["crop_start"].default)


class DenseProcessor(HunyuanVideo15AttnProcessor2_0):
    """diffusers' own, which also takes no mask, where no text is padded; its mask has a value for each pair of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._without_mask = CoreAttentionProcessor(plain_core)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `CoreAttentionProcessor` is called."""
        attend = self._without_mask if attention_mask is None else super().__call__
        both: tuple[Tensor, Tensor] = attend(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )
        return both


def _processor(core: AttentionCore | None) -> Any:
    return DenseProcessor() if core is None else CoreAttentionProcessor(core)


FAMILY = Family(
    name="HunyuanVideo-1.5",
    architecture="HunyuanVideo15Transformer3DModel",
    blocks={"transformer_blocks": "num_layers"},
    self_attention="attn",
    text="after",
    grid=_grid,
    inputs=_inputs,
    noise_level=HUNYUAN_VIDEO.noise_level,
    noise_levels=HUNYUAN_VIDEO.noise_levels,
    rounds_timesteps=True,
    outside={
        "*.refiner_blocks.*": "refiner",
        "time_embed.*": "embedder",
        "context_embedder*": "embedder",
        "norm_out.*": "embedder",
    },
    guidance="two_passes",
    side_multiple=16,
    padding=(
        ("encoder_hidden_states", "encoder_attention_mask"),
        ("encoder_hidden_states_2", "encoder_attention_mask_2"),
    ),
    absent=("image_embeds",),
    padding_masks=("attention_mask",),
    joined=(("norm1.linear", "norm1_context.linear"),),
    outputs={"transformer_blocks": HUNYUAN_VIDEO.outputs["transformer_blocks"]},
    template=prompt_template,
    second_text=SecondText(_glyphs, GLYPH_TOKENS),
    call_defaults=_call_defaults,
    refusal=_refusal,
    image=_image,
    image_frame=_image_frame,
    streams={0: "hidden_states", 1: "encoder_hidden_states"},
    processor=_processor,
    rows=HUNYUAN_VIDEO.rows,
    fused=FusedBlock(fusion_obstacle, fused_forward),
)
