"""The quantized model, or one block of it, from the source's weights and block artifacts, before there is a checkpoint;
and the model that it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from reelquant.checkpoint.layer_packing import read_block_artifact
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.quantization.layer_spec import LAYER_SUFFIXES, LayerSpec
from reelquant.quantization.linear import replace_linear_layers
from reelquant.runtime.attach import attach_runtime
from workers.model_source import build_on_meta, family_of_model, load_tensors, transformer_config, weight_files


def quantized_block(
    model: Path, name: str, artifact: Path, *, device: torch.device, dtype: torch.dtype, variant: str | None = None
) -> nn.Module:
    """One block with its quantized layers; its attention is dense.

    Args:
        model: the source's pipeline folder.
        artifact: the block's, of `checkpoint.layer_packing.write_block_artifact`.
        dtype: of everything but the tensors of quantized layers, whose dtypes the format prescribes.
        variant: of the source's weight files.
    """
    with torch.device("meta"):
        block: nn.Module = family_of_model(model).build_block(transformer_config(model), name)
    prefix = f"{name}."
    stored, specs = read_block_artifact(artifact)
    inside = {
        layer.removeprefix(prefix): replace(spec, group=spec.group.removeprefix(prefix))
        for layer, spec in specs.items()
    }
    tensors = {key.removeprefix(prefix): tensor for key, tensor in stored.items()}
    kept = load_tensors(model / "transformer", name, variant=variant)
    _fill(block, inside, {**kept, **tensors}, device=device, dtype=dtype)
    return block


def quantized_transformer(
    model: Path,
    artifacts: Sequence[Path],
    *,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    spec: QuantizationSpec | None = None,
) -> Any:
    """The whole transformer with the quantized layers of `artifacts`.

    Args:
        model: the source's pipeline folder.
        artifacts: of all blocks, and what lies outside of them.
        dtype, variant: as for `quantized_block`.
        spec: gives it sparse attention, protected steps and a velocity correction, as far as it has them; its layers are
            not read.
    """
    transformer = build_on_meta(transformer_config(model), family_of_model(model))
    layers: dict[str, LayerSpec] = {}
    stored: dict[str, Tensor] = {}
    for path in artifacts:
        tensors, specs = read_block_artifact(path)
        stored.update(tensors)
        layers.update(specs)
    kept = _source_tensors(model, variant, without={f"{layer}.weight" for layer in layers})
    _fill(transformer, layers, {**kept, **stored}, device=device, dtype=dtype)
    if spec is not None:
        attach_runtime(transformer, spec)
    return transformer


def full_precision_transformer(
    model: Path, *, device: torch.device, dtype: torch.dtype, variant: str | None = None
) -> Any:
    """The source's transformer, without the rest of its pipeline."""
    transformer = build_on_meta(transformer_config(model), family_of_model(model))
    _fill(transformer, {}, _source_tensors(model, variant, without=set()), device=device, dtype=dtype)
    return transformer


def _source_tensors(model: Path, variant: str | None, *, without: set[str]) -> dict[str, Tensor]:
    files = weight_files(model / "transformer", variant=variant)
    tensors: dict[str, Tensor] = {}
    for path in dict.fromkeys(files.values()):
        with safe_open(path, framework="pt") as opened:
            own = (name for name, file in files.items() if file == path and name not in without)
            tensors.update({name: opened.get_tensor(name) for name in own})
    return tensors


def _fill(
    module: nn.Module,
    layers: Mapping[str, LayerSpec],
    tensors: Mapping[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Replaces the linears that `layers` names and gives the module, which is on the meta device, its tensors."""
    replace_linear_layers(module, layers)
    own = {f"{layer}.{suffix}" for layer in layers for suffix in LAYER_SUFFIXES}
    # A quantized layer's full-precision weight has no place any more.
    state = {
        name: tensor.to(device) if name in own else tensor.to(device, dtype)
        for name, tensor in tensors.items()
        if name.removesuffix(".weight") not in layers
    }
    module.load_state_dict(state, assign=True, strict=True)
    module.requires_grad_(False).eval()
