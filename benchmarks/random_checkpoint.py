"""Checkpoints with random weights in bf16: HunyuanVideo's transformer alone, or its whole diffusers pipeline folder.

Written block by block, so that neither host nor GPU holds the model: 24 GiB for 13 B parameters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from benchmarks.harness import ROOT
from benchmarks.random_model import fill_randomly
from reelquant.families.hunyuan_video import FAMILY
from workers.model_source import build_on_meta

FILE_BYTES = 4 * 10**9
REAL = ROOT / "configs" / "models" / "hunyuanvideo-13b"
"""Configurations of the scheduler and the VAE."""
DIGITS = ROOT / "assets" / "hunyuanvideo-digits"
"""Tokenizers, and what the text encoders have beside their sizes."""
TEXT_LAYERS = 3
"""Of the text encoder, whose last two the pipeline leaves out."""
CLIP_LAYERS = 2
HEAD_DIM = 128


def write_pipeline(folder: Path, transformer: Mapping[str, Any], device: torch.device, *, vae_width: int = 128) -> None:
    """A folder that `DiffusionPipeline.from_pretrained` opens, `model_index.json` last.

    The text encoders have the widths that the transformer reads and few layers; they and the tokenizers know the words of the
    digits' prompts only, others are unknown words.

    Args:
        transformer: its configuration.
        device: draws the weights.
        vae_width: channels of the VAE's outermost blocks, a multiple of 32; 128 is HunyuanVideo's.
    """
    write_transformer(folder / "transformer", dict(transformer), device)
    shutil.copytree(REAL / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(DIGITS / name, folder / name, dirs_exist_ok=True)
    torch.manual_seed(0)
    with device:
        vae = AutoencoderKLHunyuanVideo.from_config(_vae_config(vae_width))
        text_encoder = LlamaModel(_text_config(int(transformer["text_embed_dim"])))
        text_encoder_2 = CLIPTextModel(_clip_config(int(transformer["pooled_projection_dim"])))
    for name, module in {"vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}.items():
        component: Any = nn.Module.to(module, torch.bfloat16)
        component.save_pretrained(folder / name)
    shutil.copyfile(DIGITS / "model_index.json", folder / "model_index.json")


def write_transformer(folder: Path, config: dict[str, Any], device: torch.device) -> None:
    """`config.json` and bf16 safetensors of about `FILE_BYTES`, drawn on `device` one block at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        name = f"diffusion_pytorch_model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
        tensors.clear()

    for index, (prefix, module) in enumerate(_parts(build_on_meta(config, FAMILY))):
        drawn = fill_randomly(nn.Module.to(module, torch.bfloat16).to_empty(device=device), seed=index)
        tensors.update({f"{prefix}.{name}": value.cpu() for name, value in drawn.state_dict().items()})
        module.to("meta")
        if sum(tensor.nbytes for tensor in tensors.values()) > FILE_BYTES:
            flush()
    flush()
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))  # last: it says that the folder is whole


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every block, and of everything beside the blocks."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", block) for index, block in enumerate(child))
        else:
            yield name, child


def _vae_config(width: int) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((REAL / "vae" / "config.json").read_text(encoding="utf-8"))
    return config | {"block_out_channels": [width, 2 * width, 4 * width, 4 * width]}


def _text_config(width: int) -> LlamaConfig:
    heads = width // HEAD_DIM
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": TEXT_LAYERS, "head_dim": HEAD_DIM}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4), "initializer_range": 0.02}
    return LlamaConfig.from_pretrained(str(DIGITS / "text_encoder"), **sizes, **heads_of)


def _clip_config(width: int) -> CLIPTextConfig:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
    layers = {"num_hidden_layers": CLIP_LAYERS, "num_attention_heads": width // 64}
    return CLIPTextConfig.from_pretrained(str(DIGITS / "text_encoder_2"), **sizes, **layers)
