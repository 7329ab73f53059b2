"""What lies in a checkpoint's folder: its weight files by their headers, and where they disagree with the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from reelquant.checkpoint.pipeline_files import read_json, weight_map
from reelquant.checkpoint.safetensors_file import StoredTensor, open_file
from reelquant.checkpoint.schema import QUANT_METHOD
from reelquant.quantization.layer_spec import TensorInfo, layer_tensors
from reelquant.quantization.linear import QuantizedLinear

TRANSFORMER = "transformer"
"""The component that serves all steps, or the first ones of a pipeline with two transformers."""
SECOND_TRANSFORMER = "transformer_2"
"""The one that serves the later steps."""
_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a transformer's folder.

    Raises:
        ValueError: the file does not exist or is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder.parent} is no diffusers pipeline with a transformer")
    return read_json(path)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a pipeline folder whose transformer this package quantized."""
    try:
        quantization = read_config(path / TRANSFORMER).get("quantization_config")
    except ValueError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def read_weights(
    folder: Path, *, variant: str | None = None, alone: bool = True
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Stored tensors by name, from the headers of a transformer's weight files, and what is wrong with the files.

    Args:
        variant: of the weight files, such as `fp16`.
        alone: whatever the index does not name is wrong, as in a checkpoint; a source may have variants beside its files, and
            its loader reads no tensor that is not in the index.
    """
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    files = weight_map(folder, variant=variant)
    for file, promised in files.items():
        try:
            found, _ = open_file(folder / file)
        except FileNotFoundError:
            problems.append(f"file {file} does not exist")
            continue
        except ValueError as error:
            problems.append(str(error))
            continue
        problems += [f"tensor {name}: the index promises it in {file}" for name in sorted(set(promised) - set(found))]
        unlisted = sorted(set(found) - set(promised)) if promised else []
        if alone:
            problems += [f"tensor {name}: lies in {file}, but the index does not say so" for name in unlisted]
        else:
            found = {name: tensor for name, tensor in found.items() if name not in unlisted}
        problems += [f"tensor {name}: is stored twice" for name in sorted(set(found) & set(tensors))]
        tensors.update(found)
    stray = {path.name for path in folder.glob("*.safetensors")} - set(files) if alone else set()
    problems += [f"file {file}: is no part of the model" for file in sorted(stray)]
    return tensors, problems


def source_weights(folder: Path, *, variant: str | None = None) -> dict[str, StoredTensor]:
    """Stored tensors by name of a full-precision transformer's folder; each of its files is opened once.

    Raises:
        ValueError: a file is missing or damaged, or the index does not fit; all that is wrong.
    """
    tensors, problems = read_weights(folder, variant=variant, alone=False)
    if problems:
        raise ValueError(f"{folder}: " + "; ".join(problems))
    return tensors


def disagreements(
    model: nn.Module, stored: Mapping[str, TensorInfo], *, ignored: Iterable[str] = (), all_read: bool = True
) -> list[str]:
    """Every tensor that the checkpoint lacks, has too much, or has in another shape or dtype than `model` needs.

    Args:
        model: with its quantized layers in place; tensors may be on the meta device.
        stored: dtypes and shapes in the checkpoint.
        ignored: regular expressions of names that may be there without a use.
        all_read: False where a file has its own problem: a tensor that is not stored may be in it, and is not named.
    """
    strict: dict[str, TensorInfo] = {}
    problems = []
    for name, layer in quantized_layers(model).items():
        if f"{name}.weight" in stored and f"{name}.weight_packed" not in stored:
            problems.append(f"layer {name}: is declared as quantized, but {name}.weight is stored, not quantized")
        expected = layer_tensors(layer.name, layer.spec, in_features=layer.in_features, out_features=layer.out_features)
        strict.update({f"{name}.{suffix}": info for suffix, info in expected.items()})
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in sorted(wanted.items()):
        found = stored.get(name)
        if found is None:
            problems += [f"tensor {name}: is missing"] if all_read else []
        elif found.shape != shape:
            problems.append(f"tensor {name}: has the shape {list(found.shape)}, not {list(shape)}")
        elif name in strict and found.dtype != strict[name].dtype:
            problems.append(f"tensor {name}: has the dtype {found.dtype}, not {strict[name].dtype}")
        elif name not in strict and found.dtype not in _FLOATING:
            problems.append(f"tensor {name}: has the dtype {found.dtype}, which is not floating")
    patterns = [re.compile(pattern) for pattern in ignored]
    extra = (name for name in sorted(set(stored) - set(wanted)) if not any(p.search(name) for p in patterns))
    return problems + [f"tensor {name}: is not a part of the model" for name in extra]


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
