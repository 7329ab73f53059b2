"""The model to compress: opens it as a diffusers pipeline, one block of it, and says beforehand what is wrong with it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from reelquant.checkpoint.pipeline_files import MODEL_INDEX, read_components, read_json, transformer_names
from reelquant.checkpoint.reader import SECOND_TRANSFORMER, TRANSFORMER
from reelquant.checkpoint.safetensors_file import StoredTensor
from reelquant.diffusers_internals import float32_modules, no_initial_weights
from reelquant.families.attention_core import set_attention_core
from reelquant.families.family import Family, ImageUse, VideoSize, empty_transformer, family_of_architecture
from reelquant.settings.generation import Generation
from workers.component_check import component_problems, pipeline_class_of, pipeline_inputs, structure_problems


def open_pipeline(folder: Path, *, device: torch.device, dtype: torch.dtype, variant: str | None = None) -> Any:
    """The pipeline in `folder`, on `device`, as `read_pipeline` reads it."""
    return read_pipeline(folder, dtype=dtype, variant=variant).to(device)


def read_pipeline(folder: Path, *, dtype: torch.dtype, variant: str | None = None, **components: nn.Module) -> Any:
    """The pipeline in `folder` in host memory, silent, from local safetensors only.

    Its VAE decodes in tiles of space, as it always does in tiles of time: whole frames of 720 x 1280 would take 34 GiB.
    Videos of one tile (256 x 256) come out the same.

    Args:
        variant: of the weight files, such as `fp16`, of components that have it.
        components: those that are open already, by name.
    """
    # Not by DiffusionPipeline, which reads components again that its own class does not know as optional ones.
    pipeline_class = pipeline_class_of(folder) or DiffusionPipeline
    pipeline = pipeline_class.from_pretrained(
        str(folder), dtype=dtype, local_files_only=True, use_safetensors=True, variant=variant, **components
    )
    assert all(getattr(pipeline, name) is component for name, component in components.items())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling()
    return pipeline


def transformer_config(model: Path) -> dict[str, Any]:
    """`config.json` of the transformer; a second one is built like the first (`check_model`).

    Raises:
        ValueError: the file is missing, or holds no JSON object.
    """
    return read_json(model / TRANSFORMER / "config.json")


def roles(model: Path) -> tuple[str, ...]:
    """Components that are the transformers of a pipeline, in the order in which they serve: one, or two."""
    second = SECOND_TRANSFORMER in read_components(model)
    return (TRANSFORMER, SECOND_TRANSFORMER) if second else (TRANSFORMER,)


def family_of_model(model: Path) -> Family:
    """The family of the model in `model`.

    Raises:
        ValueError: the transformer's `config.json` cannot be read, or no family knows its architecture.
    """
    config = transformer_config(model)
    try:
        return family_of_architecture(config.get("_class_name"))
    except ValueError as error:
        raise ValueError(f"{model / TRANSFORMER / 'config.json'}: {error}") from None


def load_tensors(
    weights: Mapping[str, StoredTensor],
    prefix: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors whose name begins with `prefix.`, without the prefix; as stored, or brought to a device and dtype."""
    own = (name for name in weights if name.startswith(f"{prefix}."))
    return {name.removeprefix(f"{prefix}."): weights[name].read().to(device, dtype) for name in own}


def load_block(
    model: Path, weights: Mapping[str, StoredTensor], name: str, *, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """One block with its weights: the memory of the block, not of the model.

    Args:
        model: the pipeline folder.
        weights: of the transformer that has the block, of `source_weights`.
    """
    block = empty_block(transformer_config(model), family_of_model(model), name)
    block.load_state_dict(load_tensors(weights, name, device=device, dtype=dtype), assign=True, strict=True)
    return block.eval()


@dataclass(frozen=True)
class ModelCheck:
    """What was found in a model's folder."""

    problems: tuple[str, ...]
    """Everything that would make a run on the model fail, `model: ` in front; empty when it is sound."""
    fingerprint: str
    """Over names and contents of the files that are read, and of no others; empty unless it is sound and was read."""
    can_plan: bool
    """Whether settings alone say enough to plan a run: what is wrong, if anything, are the weights and other files."""


def check_model(model: Path, *, variant: str | None = None, weights: bool = True) -> ModelCheck:
    """Checks the model in `model`.

    Args:
        variant: of the weight files, such as `fp16`, of components that have it.
        weights: reads every file once and compares all tensors with the components' classes; without it, settings alone.
    """
    if not model.is_dir():
        return ModelCheck((f"model: {model} is not a folder",), "", can_plan=False)
    if not (model / MODEL_INDEX).is_file():
        problem = f"model: {model} has no {MODEL_INDEX}: not a diffusers pipeline folder"
        return ModelCheck((problem,), "", can_plan=False)
    settings = [*structure_problems(model), *_transformer_problems(model)]
    found, fingerprint = component_problems(model, variant=variant) if weights else ([], "")
    problems = tuple(f"model: {problem}" for problem in dict.fromkeys([*settings, *found]))
    return ModelCheck(problems, "" if problems else fingerprint, can_plan=not settings)


def model_problems(model: Path, *, variant: str | None = None) -> list[str]:
    """The problems of `check_model`."""
    return list(check_model(model, variant=variant).problems)


def _transformer_problems(model: Path) -> list[str]:
    """Whether the transformer's configuration is one that a family knows, not quantized, and agrees with itself."""
    path = model / TRANSFORMER / "config.json"
    try:
        family, config = family_of_model(model), transformer_config(model)
        others = _second_problems(model, family, config) or _image_problems(model, family, config)
    except ValueError as error:
        return [str(error)]
    if "quantization_config" in config:
        return [f"{path} is quantized already; calibration starts from the 16-bit model"]
    if others:
        return others
    try:
        build_on_meta(config, family)
        problem = None if family.refusal is None else family.refusal(config)
    except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        return [f"{path}: no {family.architecture} can be built from it: {type(error).__name__}: {error}"]
    return [] if problem is None else [f"{path}: {problem}"]


def _image_problems(model: Path, family: Family, config: Mapping[str, Any]) -> list[str]:
    """Why the pipeline and its transformer are not both made for images."""
    index = model / MODEL_INDEX
    if pipeline_class_of(model) is None:
        return []  # said elsewhere
    asked, pipeline = image_use(model, family, config), pipeline_inputs(model)
    if asked == "needed" and pipeline.image == "none":
        return [
            f"{index}: _class_name is {pipeline.name}, which takes no image, but the transformer makes videos from one: name "
            "its image-to-video pipeline there"
        ]
    if asked == "none" and pipeline.image == "needed":
        return [
            f"{index}: _class_name is {pipeline.name}, which makes a video from an image, but this {family.name} makes it from "
            "text alone: give the folder of a text-to-video model"
        ]
    return []


def image_use(model: Path, family: Family, config: Mapping[str, Any]) -> ImageUse:
    """Whether the transformer of a model makes videos from an image."""
    return "none" if family.image is None else family.image(config, read_json(model / MODEL_INDEX))


def _second_problems(model: Path, family: Family, config: Mapping[str, Any]) -> list[str]:
    """Why the transformers beside the first one cannot be quantized with it."""
    index = model / MODEL_INDEX
    known = (TRANSFORMER,) if family.boundary is None else (TRANSFORMER, SECOND_TRANSFORMER)
    names = transformer_names(read_components(model))
    if others := [name for name in names if name not in known]:
        return [
            f"{index} names the transformers {', '.join(others)} too, which would stay in 16 bits: of {family.name}, "
            f"{', '.join(known)} can be quantized"
        ]
    if SECOND_TRANSFORMER not in names or family.boundary is None:
        return []
    second = read_json(model / SECOND_TRANSFORMER / "config.json")
    differing = [key for key in sorted({*config, *second}) if key[0] != "_" and config.get(key) != second.get(key)]
    boundary = read_json(index).get(family.boundary)
    problems = []
    if differing:
        problems.append(
            f"{model / SECOND_TRANSFORMER / 'config.json'} differs from that of {TRANSFORMER} in {', '.join(differing)}; "
            "two transformers of one size are supported"
        )
    if not isinstance(boundary, int | float) or not 0 < boundary < 1:
        problems.append(
            f"{index}: {family.boundary} is {boundary!r}, but there are two transformers: it must lie between 0 and 1, the "
            f"noise level below which {SECOND_TRANSFORMER} serves"
        )
    return problems


def linear_shapes(config: Mapping[str, Any], family: Family) -> dict[str, tuple[int, int]]:
    """`(outputs, inputs)` of every linear layer of the transformer by full name, without allocating it."""
    model = build_on_meta(config, family)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def build_on_meta(config: Mapping[str, Any], family: Family) -> nn.Module:
    """The whole transformer without memory."""
    model: nn.Module = empty_transformer(config, family.architecture)
    return model


def build_without_weights(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of `folder/config.json`: parameters on the meta device, buffers with their values, as diffusers builds it."""
    config = read_json(folder / "config.json")
    model_class = getattr(diffusers, config["_class_name"])
    with _default_dtype(dtype), no_initial_weights(), init_empty_weights():
        model: nn.Module = model_class.from_config(config)
    kept = float32_modules(model_class)
    for name, parameter in model.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model.requires_grad_(False).eval()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def empty_component(model: Path, name: str) -> nn.Module | None:
    """A component of a pipeline folder without memory, or None for what is no torch module (schedulers, tokenizers)."""
    library, class_name = read_components(model)[name]
    kind: Any = getattr(importlib.import_module(library), class_name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return None
    folder, found = model / name, cast(Any, kind)
    with torch.device("meta"):
        if library == "transformers":
            built: nn.Module = found(found.config_class.from_pretrained(str(folder), local_files_only=True))
        else:
            built = found.from_config(read_json(folder / "config.json"))
    return built


def compression(model: Path) -> tuple[int, int]:
    """How many frames, and pixels on a side, of a video are one of the latents of its VAE.

    Raises:
        ValueError: there is no VAE, or it cannot be built and its configuration does not say so.
    """
    config: Mapping[str, Any] = read_json(model / "vae" / "config.json")
    vae, found = None, []
    for names in (
        ("temporal_compression_ratio", "scale_factor_temporal"),
        ("spatial_compression_ratio", "scale_factor_spatial"),
    ):
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is None:  # older files leave out what is the class's default
            vae = vae or empty_component(model, "vae")
            own = {**getattr(vae, "config", {}), names[0]: getattr(vae, names[0], None)}
            value = next((own[name] for name in names if own.get(name) is not None), None)
            if value is None and "spatial" in names[0] and "block_out_channels" in own:
                value = 2 ** (len(own["block_out_channels"]) - 1)  # as the pipelines of such classes count
        if value is None:
            raise ValueError(f"{model / 'vae' / 'config.json'}: neither it nor its class says {' or '.join(names)}")
        found.append(int(value))
    temporal, spatial = found
    return temporal, spatial


def video_size(model: Path, generation: Generation) -> VideoSize:
    """Sizes of the latents of a video, and what else decides the shapes of a transformer's call.

    Raises:
        ValueError: as `compression`.
    """
    temporal, spatial = compression(model)
    family, index = family_of_model(model), read_json(model / MODEL_INDEX)
    template = family.template(transformer_config(model))
    takes_image = pipeline_inputs(model).image != "none" and family.image is not None
    return VideoSize(
        (generation.num_frames - 1) // temporal + 1,
        generation.height // spatial,
        generation.width // spatial,
        template.num_tokens(generation.max_sequence_length),
        num_image=_num_image_tokens(model) if takes_image else None,
        num_second_text=0 if family.second_text is None else family.second_text.limit,
        token_timesteps=family.token_timesteps is not None and bool(index.get(family.token_timesteps)),
    )


def _num_image_tokens(model: Path) -> int:
    """Tokens that the image encoder makes of an image, a class token included; 0 without one."""
    encoder = empty_component(model, "image_encoder") if "image_encoder" in read_components(model) else None
    modules = {} if encoder is None else dict(encoder.named_modules())
    tables = [cast(nn.Embedding, table) for name, table in modules.items() if name.endswith("position_embedding")]
    return tables[0].num_embeddings if tables else 0


def empty_block(config: Mapping[str, Any], family: Family, name: str) -> nn.Module:
    """One block without memory, which is called as `BlockCall` calls it.

    Raises:
        ValueError: the model has no block `name`, or its family does not support it.
    """
    family.check_block(config, name)
    # Blocks of a list are alike, but for the last one in some families.
    modules, _, index = name.rpartition(".")
    key = family.blocks[modules]
    is_last = int(index) + 1 == config[key]
    short = {**config, **dict.fromkeys(family.blocks.values(), 1), key: 1 if is_last else 2}
    block = copy.deepcopy(_built(json.dumps(short), family.architecture).get_submodule(f"{modules}.0"))
    set_attention_core(family, block, None)
    return block


@lru_cache(maxsize=8)
def _built(config: str, architecture: str) -> nn.Module:
    """A transformer without memory, of which blocks are copied: building one takes longer than a block's copy."""
    model: nn.Module = empty_transformer(json.loads(config), architecture)
    return model
