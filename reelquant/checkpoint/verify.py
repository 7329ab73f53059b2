"""Whether a checkpoint is what it says: every file of its components against its digest; of its transformers also headers, then
every tensor's numbers and every layer's digest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import nn

from reelquant.checkpoint.file_digests import digest_problems, read_digests
from reelquant.checkpoint.layer_packing import value_problem
from reelquant.checkpoint.pipeline_files import MODEL_INDEX, list_files, read_components, transformer_names
from reelquant.checkpoint.reader import (
    SECOND_TRANSFORMER,
    TRANSFORMER,
    disagreements,
    quantized_layers,
    read_config,
    read_weights,
)
from reelquant.checkpoint.safetensors_file import StoredTensor, open_file
from reelquant.checkpoint.schema import QUANT_METHOD, QuantizationSpec
from reelquant.diffusers_internals import ignored_keys
from reelquant.ops.fake_quantization.reference import LARGEST_INT8
from reelquant.quantization.layer_spec import LAYER_SUFFIXES, layer_digest
from reelquant.quantization.linear import QuantizedLinear, replace_linear_layers
from reelquant.quantization.quantizer import max_code

_SOURCE_BYTES = 2
"""Bytes of a number in the 16-bit source with which a checkpoint is compared."""


@dataclass(frozen=True)
class LayerReport:
    """What one quantized layer takes."""

    weight_bits: int
    """Bits of a code."""
    activation_bits: int
    """Bits of the input's codes; 16: not quantized."""
    num_weights: int
    """Weights of the layer."""
    stored_bytes: int
    """Bytes of all its tensors, the bias and a group's shared tensors too."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and everything else counted."""
        return 8 * self.stored_bytes / self.num_weights


@dataclass
class VerificationReport:
    """Result of `verify_checkpoint`. Byte counts are 0 where the problems did not let them be known."""

    path: Path
    problems: list[str] = field(default_factory=list)
    """Everything that is wrong; empty for a sound checkpoint."""
    bits: str = ""
    """Label such as `W4A6`."""
    layers: dict[str, LayerReport] = field(default_factory=dict)
    """Quantized layers by name; those of a second transformer with `transformer_2.` in front."""
    total_bytes: int = 0
    """Bytes of all tensors of the transformers."""
    source_bytes: int = 0
    """Bytes that the transformers take with 16 bits a number."""
    num_files: int = 0
    """Files that were compared with their digests in `reelquant.json`."""
    not_covered: tuple[str, ...] = ()
    """Components without digests, as `reelquant.json` is not there: their files are there and can be read, no more is known."""

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is sound."""
        return not self.problems

    @property
    def compression(self) -> float:
        """How many times smaller than with 16 bits a number; 0 if unknown."""
        return self.source_bytes / self.total_bytes if self.total_bytes else 0.0


def verify_checkpoint(path: Path) -> VerificationReport:
    """Checks the pipeline folder `path`; what is wrong is reported, not raised.

    Of every component that `model_index.json` names: whether its files are there and can be read, and whether they have the
    digests in `reelquant.json`, where there is one. Of the transformers, tensor by tensor: names, shapes and dtypes against the
    model; that every number is finite, that scales are positive, that codes are in range, and that every layer has the
    digest which its description promises.
    """
    report = VerificationReport(path)
    names = _transformers(path)
    for name in names:
        problems = _check_transformer(report, path / name, "" if name == TRANSFORMER else f"{name}.")
        report.problems += problems if len(names) == 1 else [f"{name}: {problem}" for problem in problems]
    if (path / TRANSFORMER / "config.json").is_file() or (path / MODEL_INDEX).is_file():
        _check_files(report, path, names)
    report.problems[:] = dict.fromkeys(report.problems)
    return report


def _transformers(path: Path) -> tuple[str, ...]:
    """The transformers that must be quantized; `transformer` where the index cannot say, whose problems are named elsewhere."""
    try:
        second = SECOND_TRANSFORMER in transformer_names(read_components(path))
    except ValueError:
        second = False
    return (TRANSFORMER, SECOND_TRANSFORMER) if second else (TRANSFORMER,)


def _check_transformer(report: VerificationReport, folder: Path, prefix: str) -> list[str]:
    """Problems of the transformer in `folder`; its sound layers go into the report, their names after `prefix`."""
    try:
        config = read_config(folder)
        spec = _specification(config, folder)
        report.bits = spec.bits
        model = empty_model(config, spec)
        stored, problems = read_weights(folder)
    except ValueError as error:
        return [str(error)]
    infos = {name: tensor.info for name, tensor in stored.items()}
    problems += disagreements(model, infos, ignored=ignored_keys(model), all_read=not problems)
    if problems:
        return problems
    _count(report, model, stored, prefix)
    layers = quantized_layers(model)
    for name in sorted(stored):
        parent, _, suffix = name.rpartition(".")
        problem = value_problem(suffix if parent in layers else name, stored[name].read())
        if problem is not None:
            problems.append(f"tensor {name}: {problem}")
    for name, layer in layers.items():
        problems += _layer_problems(name, layer, stored)
    return problems


def _check_files(report: VerificationReport, path: Path, transformers: tuple[str, ...]) -> None:
    files, problems = list_files(path)
    others = {name: file for name, file in files.items() if name.split("/")[0] not in transformers}
    checked = tuple(str(path / name) for name in transformers)
    report.problems += [problem for problem in problems if not problem.startswith(checked)]
    for file in others.values():
        try:
            if file.suffix == ".safetensors":
                open_file(file)
            elif file.suffix == ".json":
                json.loads(file.read_bytes())
        except (ValueError, OSError) as error:
            report.problems.append(f"{file}: cannot be read: {error}")
    try:
        digests = read_digests(path)
        if digests is not None:
            report.problems += digest_problems(path, digests)
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
        return
    if digests is None:
        report.not_covered = tuple(dict.fromkeys(name.split("/")[0] for name in others))
    else:
        report.num_files = len(digests)


def empty_model(config: Mapping[str, Any], spec: QuantizationSpec) -> nn.Module:
    """The model of a transformer's `config.json` on the meta device, with empty quantized layers in place.

    Raises:
        ValueError: diffusers has no such model, or its layers are not those of `spec`.
    """
    architecture = str(config.get("_class_name"))
    model_class: Any = getattr(diffusers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
        raise ValueError(f"diffusers {diffusers.__version__} has no model {architecture!r}; a newer one may have it")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"):
        model: nn.Module = cast(Any, model_class).from_config(plain)
        replace_linear_layers(model, spec.layers)
    return model


def _specification(config: Mapping[str, Any], folder: Path) -> QuantizationSpec:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{folder}/config.json: its quantization_config is not one of reelquant: nothing is quantized")
    return QuantizationSpec.from_dict(quantization)


def _count(report: VerificationReport, model: nn.Module, stored: Mapping[str, StoredTensor], prefix: str) -> None:
    layers = quantized_layers(model)
    num_numbers = 0
    for name, tensor in stored.items():
        parent, _, suffix = name.rpartition(".")
        if parent not in layers or suffix not in LAYER_SUFFIXES:
            num_numbers += math.prod(tensor.info.shape)
    for name, layer in layers.items():
        num_weights = layer.in_features * layer.out_features
        num_numbers += num_weights
        taken = sum(stored[f"{name}.{suffix}"].info.num_bytes for suffix in layer.state_dict())
        report.layers[prefix + name] = LayerReport(
            layer.spec.weight_bits, layer.spec.activation_bits, num_weights, taken
        )
    report.total_bytes += sum(tensor.info.num_bytes for tensor in stored.values())
    report.source_bytes += num_numbers * _SOURCE_BYTES


def _layer_problems(name: str, empty: QuantizedLinear, stored: Mapping[str, StoredTensor]) -> list[str]:
    own = {suffix: stored[f"{name}.{suffix}"].read() for suffix in empty.state_dict() if suffix != "bias"}
    digest = layer_digest(own)
    if digest != empty.spec.digest:
        return [f"layer {name}: its tensors have the digest {digest}, not {empty.spec.digest!r}"]
    problems = []
    layer = QuantizedLinear(empty.in_features, empty.out_features, empty.spec, name=name, bias=False)
    layer.load_state_dict(own)
    largest = max_code(empty.spec.weight_bits)
    if int(layer.codes().to(torch.int16).abs().max()) > largest:
        problems.append(f"layer {name}: has codes beyond {largest}")
    if layer.group_scale is not None and int(layer.group_scale.max()) > LARGEST_INT8 // largest:
        problems.append(f"layer {name}: has group scales beyond {LARGEST_INT8 // largest}: with codes they exceed INT8")
    return problems
