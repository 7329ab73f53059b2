"""Bytes of the source model, of a method's block artifacts and of its checkpoint: exact, from shapes and bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.loading import ConfigError
from pipeline.model_facts import ModelFacts
from reelquant.checkpoint.pipeline_files import list_files, read_components
from reelquant.checkpoint.reader import SECOND_TRANSFORMER, TRANSFORMER, read_weights
from reelquant.quantization.layer_spec import LayerSpec, TensorInfo, layer_tensors
from reelquant.quantization.rotation import block_size
from workers.messages import MethodPlan
from workers.model_source import build_on_meta, empty_component

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1}
_SOURCE_BYTES = 2
"""Bytes of a number in the 16-bit source with which a checkpoint is compared, as `verify` counts."""


@dataclass(frozen=True)
class CheckpointSize:
    """What one method's result takes."""

    method: str
    artifact_bytes: int
    """Tensors of all block artifacts."""
    transformer_bytes: int
    """Tensors of the transformers."""
    source_bytes: int
    """The same with 16 bits a number."""
    folder_bytes: int
    """The pipeline folder with its other components, which are copied."""
    num_layers: int
    """Quantized linear layers."""
    num_weights: int
    """Their weights."""

    @property
    def compression(self) -> float:
        """How many times smaller than with 16 bits a number, as `verify` says it."""
        return self.source_bytes / self.transformer_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and transforms counted."""
        return 8 * self.artifact_bytes / self.num_weights


def source_tensors(model: ModelFacts) -> dict[str, TensorInfo]:
    """The transformers' tensors by `<component>/<name>`: from the headers of their weights, or from their architecture in
    bfloat16 without them."""
    return {f"{role}/{name}": info for role in model.roles for name, info in _tensors_of(model, role).items()}


def _tensors_of(model: ModelFacts, role: str) -> dict[str, TensorInfo]:
    try:
        stored, problems = read_weights(model.folder / role, variant=model.variant, alone=False)
    except ValueError:
        stored, problems = {}, ["no weights"]
    if not problems:
        return {name: tensor.info for name, tensor in stored.items()}
    state = build_on_meta(model.config, model.family).state_dict()
    return {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in state.items()}


def planned_layers(model: ModelFacts, method: MethodPlan) -> dict[str, LayerSpec]:
    """Specification of every layer that `method` quantizes, as distillation will write it (digests left empty)."""
    recipe, specs = method.recipe, {}
    groups = [
        [name for layer in group.layers if (name := f"{block}.{layer}") in method.bits]
        for block in model.blocks
        for level in model.calls[block].levels
        for group in level
    ]
    for names in groups:
        for name in names:
            bits = method.bits[name]
            quantized = bits.activation < 16
            block = block_size(model.linears[name][1], method.recipe.rotation_block)
            specs[name] = LayerSpec(
                weight_bits=bits.weight,
                activation_bits=bits.activation,
                weight_layout=recipe.weight_layout,
                group=names[0],
                channel_scale=quantized and recipe.channel_scale != "none",
                rotation=block if quantized and recipe.rotation != "none" and block > 1 else 0,
                digest="",
            )
    for name, bits in method.bits.items():
        if name not in specs:  # outside the blocks: rounded to nearest, without a transform
            specs[name] = LayerSpec(
                bits.weight, bits.activation, recipe.weight_layout, name, channel_scale=False, rotation=0, digest=""
            )
    return specs


def checkpoint_size(
    model: ModelFacts, method: MethodPlan, *, tensors: Mapping[str, TensorInfo], component_bytes: Mapping[str, int]
) -> CheckpointSize:
    """Sizes of `method`'s artifacts and checkpoint.

    Args:
        tensors: `source_tensors` of the model.
        component_bytes: `copied_bytes` of the model.
    """
    specs = planned_layers(model, method)
    replaced = {f"{role}/{name}.weight" for role in model.roles for name in specs}
    kept = [info for name, info in tensors.items() if name not in replaced]
    stored = [
        info
        for name, spec in specs.items()
        for info in layer_tensors(
            name, spec, in_features=model.linears[name][1], out_features=model.linears[name][0]
        ).values()
    ]
    artifacts = len(model.roles) * sum(map(tensor_bytes, stored))
    transformer = artifacts + sum(map(tensor_bytes, kept))
    num_weights = len(model.roles) * sum(math.prod(model.linears[name]) for name in specs)
    return CheckpointSize(
        method=method.name,
        artifact_bytes=artifacts,
        transformer_bytes=transformer,
        source_bytes=_SOURCE_BYTES * (num_weights + sum(math.prod(info.shape) for info in kept)),
        folder_bytes=transformer + sum(component_bytes.values()),
        num_layers=len(model.roles) * len(specs),
        num_weights=num_weights,
    )


def repaired_bytes(model: ModelFacts, method: MethodPlan) -> int:
    """Tensors of the artifacts of all blocks with new biases in their output layers: at most what drift repair writes, as a
    block that it does not improve has no second artifact."""
    total = 0
    outputs = {f"{b}.{o.layer}" for b in model.blocks for level in model.calls[b].outputs for o in level}
    for name, spec in planned_layers(model, method).items():
        if model.kinds[name] in ("block", "modulation"):
            out, inputs = model.linears[name]
            total += sum(map(tensor_bytes, layer_tensors(name, spec, in_features=inputs, out_features=out).values()))
            total += _SOURCE_BYTES * out * (name in outputs)
    return len(model.roles) * total


def tensor_bytes(info: TensorInfo) -> int:
    """Bytes of a stored tensor."""
    return math.prod(info.shape) * _ITEM_BYTES.get(info.dtype, 8)


def copied_bytes(model: Path, *, variant: str | None = None) -> dict[str, int]:
    """Bytes of every component but the transformers, which a checkpoint copies: of its files, or counted without them.

    Components without weights of their own and files beside the components are left out where they are not there.
    """
    counted = {}
    files, _ = list_files(model, variant=variant)
    for name in components(model):
        own = [path for file, path in files.items() if file.startswith(f"{name}/")]
        if name in (TRANSFORMER, SECOND_TRANSFORMER) or not own:
            continue
        counted[name] = sum(path.stat().st_size for path in own)
        if not any(path.suffix == ".safetensors" for path in own) and (model / name / "config.json").is_file():
            counted[name] += _SOURCE_BYTES * num_parameters(model, name)
    return counted


def components(model: Path) -> dict[str, tuple[str, str]]:
    """`(library, class)` by component name, from `model_index.json`; components that are null are left out.

    Raises:
        ConfigError: there is no such file, or it names what is not of diffusers or transformers.
    """
    try:
        return read_components(model)
    except ValueError as error:
        raise ConfigError([f"model: {error}"]) from error


def num_parameters(model: Path, component: str) -> int:
    """Parameters of a component with a `config.json`, built without memory; 0 for what is no torch module."""
    built = empty_component(model, component)
    return 0 if built is None else sum(parameter.numel() for parameter in built.parameters())
