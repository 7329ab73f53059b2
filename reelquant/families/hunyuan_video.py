"""HunyuanVideo: two lists of blocks, joint attention with the text after the video, guidance as an embedding.

| `image_condition_type` | the image |
|---|---|
| null | none |
| `latent_concat` | its latents and a mask behind the noise; the pipeline leaves the first frame out of the video |
| `token_replace` | its latents in place of the first frame's, whose tokens the blocks modulate for timestep 0 |

From an image the text encoder reads it too: some of its tokens come before the prompt's. Padding is masked as a key everywhere
in the model, so dropping it changes no real token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE, retrieve_timesteps
from torch import Tensor, nn

from reelquant.families.family import (
    Arguments,
    Config,
    Family,
    FirstFrame,
    FusedBlock,
    ImageUse,
    OutputLayer,
    PromptTemplate,
    VideoSize,
)
from reelquant.families.hunyuan_video_attention import core_processor
from reelquant.families.hunyuan_video_fused import fused_forward, fusion_obstacle
from reelquant.families.hunyuan_video_rows import block_rows
from reelquant.tokens import Grid

NUM_TRAIN_TIMESTEPS = 1000
IMAGE_STRIDE = {"latent_concat": 2, "token_replace": 4}
"""Of the image's tokens, every so manieth is kept (`HunyuanVideoImageToVideoPipeline.__call__`)."""
ASSISTANT_TOKENS = 4
"""Of the template, which the same pipeline cuts off behind the prompt."""


def _grid(config: Config, call: Arguments) -> Grid:
    frames, height, width = call["hidden_states"].shape[-3:]
    patch = config["patch_size"]
    return frames // config["patch_size_t"], height // patch, width // patch


def _inputs(config: Config, size: VideoSize) -> dict[str, Any]:
    batch, text = size.batch, (size.batch, size.num_text)
    return {
        "hidden_states": torch.empty(batch, config["in_channels"], size.frames, size.height, size.width),
        "timestep": torch.empty(batch),
        "encoder_hidden_states": torch.empty(*text, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(text),
        "pooled_projections": torch.empty(batch, config["pooled_projection_dim"]),
        "guidance": torch.empty(batch) if config.get("guidance_embeds", True) else None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _noise_level(timestep: float) -> float:
    return timestep / NUM_TRAIN_TIMESTEPS


def _noise_levels(scheduler: Any, num_steps: int, _num_video: int | None) -> list[float]:
    sigmas = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
    timesteps, _ = retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=sigmas)
    return [_noise_level(float(timestep)) for timestep in timesteps]


def _condition(config: Config) -> str | None:
    return config.get("image_condition_type")


def _image(config: Config, _index: Config) -> ImageUse:
    return "none" if _condition(config) is None else "needed"


def _image_frame(config: Config, _call: Arguments) -> bool:
    return _condition(config) is not None


def _first_frame(config: Config) -> FirstFrame:
    kinds: dict[str | None, FirstFrame] = {"token_replace": "given", "latent_concat": "left_out"}
    return kinds.get(_condition(config), "made")


def _gates_by_token(config: Config) -> bool:
    return _condition(config) == "token_replace"


def _template(config: Config) -> PromptTemplate:
    condition = _condition(config)
    if condition is None:
        return PromptTemplate(str(DEFAULT_PROMPT_TEMPLATE["template"]), int(DEFAULT_PROMPT_TEMPLATE["crop_start"]))
    # Here, as transformers says something of image processors when it is imported.
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as image_to_video

    template = image_to_video.DEFAULT_PROMPT_TEMPLATE
    num_image = len(range(0, int(template["image_emb_len"]), IMAGE_STRIDE[condition]))
    return PromptTemplate(str(template["template"]), int(template["crop_start"]), ASSISTANT_TOKENS, num_image)


def _refusal(config: Config) -> str | None:
    made, condition = config["out_channels"], _condition(config)
    wanted = 2 * made + 1 if condition == "latent_concat" else made
    if config["in_channels"] != wanted:
        return (
            f"it has {config['in_channels']} input and {made} output channels; with image_condition_type {condition!r} the "
            f"pipeline hands it {wanted}"
        )
    head_dim, table = config["attention_head_dim"], sum(config["rope_axes_dim"])
    if table != head_dim:
        return f"attention heads have {head_dim} channels, but its rotary tables have {table}: they must be equal"
    return None


def _rows(block: nn.Module, call: Arguments, rows: Tensor) -> Tensor:
    stream = torch.cat([call["hidden_states"], call["encoder_hidden_states"]], dim=1)
    rotary = call.get("freqs_cis", call.get("image_rotary_emb"))
    assert rotary is not None
    replaced = None if call.get("token_replace_emb") is None else (call["token_replace_emb"], call["num_tokens"])
    return block_rows(block, stream, call["temb"], rotary=rotary, rows=rows, replaced=replaced)


FAMILY = Family(
    name="HunyuanVideo",
    architecture="HunyuanVideoTransformer3DModel",
    blocks={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    self_attention="attn",
    text="after",
    grid=_grid,
    inputs=_inputs,
    noise_level=_noise_level,
    noise_levels=_noise_levels,
    rounds_timesteps=True,
    outside={
        "*.refiner_blocks.*": "refiner",
        "time_text_embed.*": "embedder",
        "context_embedder.*": "embedder",
        "norm_out.*": "embedder",
    },
    side_multiple=16,
    padding=(("encoder_hidden_states", "encoder_attention_mask"),),
    padding_masks=("attention_mask",),
    joined=(("norm1.linear", "norm1_context.linear"), ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v")),
    outputs={
        "transformer_blocks": (
            (
                OutputLayer("attn.to_out.0", "video", ("norm1", 1)),
                OutputLayer("attn.to_add_out", "text", ("norm1_context", 1)),
            ),
            (
                OutputLayer("ff.net.2", "video", ("norm1", 4)),
                OutputLayer("ff_context.net.2", "text", ("norm1_context", 4)),
            ),
        ),
        "single_transformer_blocks": ((OutputLayer("proj_out", "joint", ("norm", 1)),),),
    },
    gates_by_token=_gates_by_token,
    template=_template,
    refusal=_refusal,
    image=_image,
    image_frame=_image_frame,
    first_frame=_first_frame,
    processor=core_processor,
    rows=_rows,
    fused=FusedBlock(fusion_obstacle, fused_forward),
)
