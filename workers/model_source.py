"""The model to compress: opens it as a diffusers pipeline, one block of it, and says beforehand what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from reelquant.families.family import family_of


def open_pipeline(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline in `folder`, on `device`, as `read_pipeline` reads it."""
    return read_pipeline(folder, dtype=dtype).to(device)


def read_pipeline(folder: Path, *, dtype: torch.dtype, **components: nn.Module) -> Any:
    """The pipeline in `folder` in host memory, silent, from local safetensors only.

    Its VAE decodes in tiles of space, as it always does in tiles of time: whole frames of 720 x 1280 would take 34 GiB.
    Videos of one tile (256 x 256) come out the same.

    Args:
        components: those that are open already, by name.
    """
    pipeline = DiffusionPipeline.from_pretrained(
        str(folder), dtype=dtype, local_files_only=True, use_safetensors=True, **components
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling()
    return pipeline


def transformer_config(model: Path) -> dict[str, Any]:
    """`config.json` of the transformer."""
    config: dict[str, Any] = json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8"))
    return config


def family_of_model(model: Path) -> ModuleType:
    """The family module of the model in `model`."""
    return family_of(model / "transformer" / "config.json")


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, for a diffusers component folder (sharded or not)."""
    files: dict[str, Path] = {}
    for path in _listed_files(folder):
        with safe_open(path, framework="pt") as opened:
            files.update(dict.fromkeys(opened.keys(), path))
    return files


def load_tensors(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """All tensors whose name begins with `prefix.`, without the prefix; nothing else is read."""
    tensors: dict[str, torch.Tensor] = {}
    for name, path in weight_files(folder).items():
        if name.startswith(f"{prefix}."):
            with safe_open(path, framework="pt") as opened:
                tensors[name.removeprefix(f"{prefix}.")] = opened.get_tensor(name)
    return tensors


def load_block(model: Path, name: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """One block with its weights: the memory of the block, not of the model."""
    family = family_of_model(model)
    with torch.device("meta"):
        block: nn.Module = family.build_block(transformer_config(model), name)
    tensors = load_tensors(model / "transformer", name)
    block.load_state_dict({key: value.to(device, dtype) for key, value in tensors.items()}, assign=True, strict=True)
    return block.eval()


def model_problems(model: Path) -> list[str]:
    """Everything that would make a run on the model in `model` fail; empty when it is sound.

    Reads every weight once: a truncated file or a NaN is found before the long job starts.
    """
    if not model.is_dir():
        return [
            f"model: {model} is not a folder. Give a local diffusers pipeline folder (models of a hub are fetched first)"
        ]
    index = model / "model_index.json"
    if not index.is_file():
        return [f"model: {model} has no model_index.json: not a diffusers pipeline folder"]
    problems: list[str] = []
    for component, value in json.loads(index.read_text(encoding="utf-8")).items():
        if component.startswith("_") or not isinstance(value, list) or value[0] is None:
            continue
        if not (model / component).is_dir():
            problems.append(f"model: {model} lacks the folder {component}/ that model_index.json names")
    config = model / "transformer" / "config.json"
    if not config.is_file():
        return [*problems, f"model: {config} is missing"]
    try:
        family_of(config)
    except ValueError as error:
        return [*problems, f"model: {error}"]
    if "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        problems.append(f"model: {config} is quantized already; calibration starts from the 16-bit model")
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        folder = model / component
        if folder.is_dir():
            problems += [f"model: {problem}" for problem in _weight_problems(folder)]
    return problems


def _listed_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a component, from its index where it has one."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{indexes[0]} names files outside its folder: {sorted(names)}")
        return [folder / name for name in sorted(names)]
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(f"{folder} has no safetensors weights (diffusion_pytorch_model.safetensors or an index)")


def _weight_problems(folder: Path) -> Iterator[str]:
    try:
        paths = _listed_files(folder)
    except (FileNotFoundError, ValueError) as error:
        yield str(error)
        return
    for path in paths:
        if not path.is_file():
            yield f"{path} is missing, though the index names it"
            continue
        try:
            with safe_open(path, framework="pt") as opened:
                bad = [name for name in opened.keys() if not _finite(opened.get_tensor(name))]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            yield f"{path} cannot be read (truncated or damaged): {error}"
            continue
        if bad:
            yield f"{path} holds NaN or infinite weights in {_some(bad)}"


def _finite(tensor: torch.Tensor) -> bool:
    """One pass at memory speed: the extremes of a tensor with NaN are NaN."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _some(names: Iterable[str], most: int = 8) -> str:
    listed = list(names)
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def linear_shapes(config: Mapping[str, Any], family: ModuleType) -> dict[str, tuple[int, int]]:
    """`(outputs, inputs)` of every linear layer of the transformer by full name, without allocating it."""
    model = build_on_meta(config, family)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def build_on_meta(config: Mapping[str, Any], family: ModuleType) -> nn.Module:
    """The whole transformer without memory."""
    import diffusers

    model_class = getattr(diffusers, family.ARCHITECTURE)
    with torch.device("meta"):
        model: nn.Module = model_class.from_config(dict(config))
    return model
