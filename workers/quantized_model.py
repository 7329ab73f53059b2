"""The quantized model, or one block of it, from the source's weights and block artifacts, before there is a checkpoint;
and the model that it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelquant.checkpoint.layer_packing import open_block_artifact
from reelquant.checkpoint.reader import TRANSFORMER
from reelquant.checkpoint.safetensors_file import StoredTensor
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.quantization.layer_spec import LAYER_SUFFIXES, LayerSpec
from reelquant.quantization.linear import replace_linear_layers
from reelquant.runtime.attach import attach_runtime
from workers.model_source import build_without_weights, empty_block, family_of_model, transformer_config


def quantized_block(
    model: Path,
    weights: Mapping[str, StoredTensor],
    name: str,
    artifact: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """One block with its quantized layers; its attention is dense.

    Args:
        model: the source's pipeline folder.
        weights: its transformer's, of `source_weights`.
        artifact: the block's, of `checkpoint.layer_packing.write_block_artifact`.
        dtype: of everything but the tensors of quantized layers, whose dtypes the format prescribes.
    """
    block = empty_block(transformer_config(model), family_of_model(model), name)
    prefix = f"{name}."
    stored, specs = open_block_artifact(artifact)
    inside = {
        layer.removeprefix(prefix): replace(spec, group=spec.group.removeprefix(prefix))
        for layer, spec in specs.items()
    }
    own = {key.removeprefix(prefix): t for key, t in {**weights, **stored}.items() if key.startswith(prefix)}
    _fill(block, inside, own, device=device, dtype=dtype)
    return block


def quantized_transformer(
    model: Path,
    weights: Mapping[str, StoredTensor],
    artifacts: Sequence[Path],
    *,
    device: torch.device,
    dtype: torch.dtype,
    spec: QuantizationSpec | None = None,
) -> Any:
    """The whole transformer with the quantized layers of `artifacts`.

    Args:
        model, weights, dtype: as for `quantized_block`.
        artifacts: of all blocks, and what lies outside of them.
        spec: gives it sparse attention, protected steps and a velocity correction, as far as it has them; its layers are
            not read.
    """
    transformer = build_without_weights(model / TRANSFORMER, dtype)
    layers: dict[str, LayerSpec] = {}
    stored: dict[str, StoredTensor] = {}
    for path in artifacts:
        tensors, specs = open_block_artifact(path)
        stored.update(tensors)
        layers.update(specs)
    _fill(transformer, layers, {**weights, **stored}, device=device, dtype=dtype)
    if spec is not None:
        attach_runtime(transformer, spec)
    return transformer


def full_precision_transformer(
    model: Path, weights: Mapping[str, StoredTensor], *, device: torch.device, dtype: torch.dtype
) -> Any:
    """The source's transformer, without the rest of its pipeline; arguments as for `quantized_block`."""
    transformer = build_without_weights(model / TRANSFORMER, dtype)
    _fill(transformer, {}, weights, device=device, dtype=dtype)
    return transformer


def _fill(
    module: nn.Module,
    layers: Mapping[str, LayerSpec],
    stored: Mapping[str, StoredTensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Replaces the linears that `layers` names and gives the module, whose parameters are on the meta device, its tensors one
    by one."""
    replace_linear_layers(module, layers)
    own = {f"{layer}.{suffix}" for layer in layers for suffix in LAYER_SUFFIXES}
    # A quantized layer's full-precision weight has no place any more.
    state = {
        name: tensor.read().to(device, None if name in own else dtype)
        for name, tensor in stored.items()
        if name.removesuffix(".weight") not in layers
    }
    module.load_state_dict(state, assign=True, strict=True)
    for owner in module.modules():  # buffers that are in no file
        for name in owner._non_persistent_buffers_set:
            if (buffer := owner._buffers[name]) is not None:
                owner.register_buffer(name, buffer.to(device), persistent=False)
    module.requires_grad_(False).eval()
