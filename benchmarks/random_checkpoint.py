"""Checkpoints with random weights in bf16 of the models in `configs/models`: a transformer, or a diffusers pipeline's folder.

Written block by block, so that neither host nor GPU holds the model: 24 GiB for 13 B parameters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from benchmarks.harness import ROOT
from benchmarks.random_model import fill_randomly
from reelquant.checkpoint.reader import SECOND_TRANSFORMER, TRANSFORMER
from reelquant.families.family import empty_transformer, family_of_architecture
from reelquant.families.hunyuan_video_15 import prompt_template

FILE_BYTES = 4 * 10**9
MODELS = ROOT / "configs" / "models"
"""Configurations of schedulers, VAEs and transformers."""
DIGITS = ROOT / "assets" / "hunyuanvideo-digits"
"""Tokenizers, and what HunyuanVideo's text encoders have beside their sizes."""
HEAD_DIM = 128
Overrides = Mapping[str, Any]


def models() -> list[str]:
    """Names in `configs/models` of those with random text encoders."""
    indices = {folder.name: _read(folder / "model_index.json") for folder in sorted(MODELS.iterdir())}
    return [name for name, index in indices.items() if index["_class_name"] in TEXT_PARTS]


def write_pipeline(folder: Path, model: str, device: torch.device, transformer: Overrides, vae: Overrides) -> list[int]:
    """A folder that `DiffusionPipeline.from_pretrained` opens, `model_index.json` last.

    The text encoders have the widths that the transformer reads and few layers; they and the tokenizers know the words of the
    digits' prompts only, others are unknown words.

    Args:
        model: name in `configs/models`.
        device: draws the weights.
        transformer: values that replace those of the transformers' configurations.
        vae: values that replace those of the VAE's configuration.

    Returns:
        the numbers of blocks in the transformer's lists.

    Raises:
        ValueError: no text encoder is known for the model's pipeline.
    """
    source = MODELS / model
    index = _read(source / "model_index.json")
    if index["_class_name"] not in TEXT_PARTS:
        raise ValueError(
            f"no random text encoder for {index['_class_name']} of {model}: there are {sorted(TEXT_PARTS)}"
        )
    for role in (TRANSFORMER, SECOND_TRANSFORMER):
        if role in index:
            config = {**_read(source / role / "config.json"), **transformer}
            write_transformer(folder / role, config, device)
    for name in {"scheduler", "guider"} & index.keys():
        shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    torch.manual_seed(0)
    with device:
        parts: dict[str, Any] = TEXT_PARTS[index["_class_name"]](config)
        parts["vae"] = getattr(diffusers, index["vae"][1]).from_config({**_read(source / "vae" / "config.json"), **vae})
    for name, part in parts.items():
        component: Any = nn.Module.to(part, torch.bfloat16) if isinstance(part, nn.Module) else part
        component.save_pretrained(folder / name)
    tokenizers = {f"tokenizer{name.removeprefix('text_encoder')}" for name in parts if name.startswith("text_encoder")}
    for name in tokenizers - parts.keys():
        shutil.copytree(DIGITS / name, folder / name, dirs_exist_ok=True)
    classes = {
        name: ["transformers", type(parts[name]).__name__ if name in parts else "PreTrainedTokenizerFast"]
        for name in sorted(tokenizers)
    }
    (folder / "model_index.json").write_text(json.dumps({**index, **classes}, indent=2))
    family = family_of_architecture(index[TRANSFORMER][1])
    return [config[key] for key in family.blocks.values()]


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

    for index, (prefix, module) in enumerate(_parts(empty_transformer(config, config["_class_name"]))):
        drawn = fill_randomly(nn.Module.to(module, torch.bfloat16).to_empty(device=device), seed=index)
        tensors.update({f"{prefix}{name}": value.cpu() for name, value in drawn.state_dict().items()})
        module.to("meta")
        if sum(tensor.nbytes for tensor in tensors.values()) > FILE_BYTES:
            flush()
    flush()
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))  # last: it says that the folder is whole


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Prefix and module of every block, of everything beside the blocks, and of the model's own parameters."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}.", block) for index, block in enumerate(child))
        else:
            yield f"{name}.", child
    own = nn.Module()
    for name, parameter in model.named_parameters(recurse=False):
        own.register_parameter(name, parameter)
    yield "", own


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _hunyuan_video(transformer: Overrides) -> dict[str, Any]:
    """Three layers of Llama, of which the pipeline leaves the last two out, and two of CLIP."""
    width, pooled = int(transformer["text_embed_dim"]), int(transformer["pooled_projection_dim"])
    heads = width // HEAD_DIM
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 3, "head_dim": HEAD_DIM}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4), "initializer_range": 0.02}
    llama = LlamaConfig.from_pretrained(str(DIGITS / "text_encoder"), **sizes, **heads_of)
    sizes = {"hidden_size": pooled, "intermediate_size": 2 * pooled, "projection_dim": pooled}
    layers = {"num_hidden_layers": 2, "num_attention_heads": pooled // 64}
    clip = CLIPTextConfig.from_pretrained(str(DIGITS / "text_encoder_2"), **sizes, **layers)
    return {"text_encoder": LlamaModel(llama), "text_encoder_2": CLIPTextModel(clip)}


def _hunyuan_video_15(transformer: Overrides) -> dict[str, Any]:
    """Three layers of Qwen2.5-VL, of which the pipeline leaves the last two out, and two of ByT5."""
    tokenizer = AutoTokenizer.from_pretrained(DIGITS / "tokenizer")
    before, after = prompt_template({}).text.split("{}")
    tokenizer.chat_template = f"{before}{{{{ messages[1]['content'] }}}}{after}"
    width, glyphs = int(transformer["text_embed_dim"]), int(transformer["text_embed_2_dim"])
    heads = max(1, width // HEAD_DIM)
    rotary = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=heads * HEAD_DIM, intermediate_size=width, num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        rope_parameters=rotary,
    )  # fmt: skip
    byt5 = T5Config(vocab_size=384, d_model=glyphs, d_kv=64, d_ff=glyphs, num_layers=2, num_heads=4)
    return {
        "text_encoder": Qwen2_5_VLTextModel(qwen), "tokenizer": tokenizer,
        "text_encoder_2": T5EncoderModel(byt5), "tokenizer_2": ByT5Tokenizer(),
    }  # fmt: skip


def _wan(transformer: Overrides) -> dict[str, Any]:
    """Two layers of umT5."""
    width = int(transformer["text_dim"])
    vocabulary = len(_read(DIGITS / "tokenizer" / "tokenizer.json")["model"]["vocab"])
    config = UMT5Config(vocab_size=vocabulary, d_model=width, d_kv=64, d_ff=width, num_layers=2, num_heads=8)
    return {"text_encoder": UMT5EncoderModel(config)}


TEXT_PARTS: dict[str, Callable[[Overrides], dict[str, Any]]] = {
    "HunyuanVideoPipeline": _hunyuan_video,
    "HunyuanVideo15Pipeline": _hunyuan_video_15,
    "WanPipeline": _wan,
}
"""Text encoders by pipeline, from the transformer's configuration, and those tokenizers that are not the digits model's."""
