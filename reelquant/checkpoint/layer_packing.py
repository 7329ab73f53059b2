"""What calibration hands to the checkpoint's assembly: packed layers, and the file with those of one transformer block.

A block artifact is a safetensors file of the tensors of `reelquant.checkpoint.schema`, with the metadata
`{"reelquant": '{"format_version": 2, "layers": {name: LayerSpec}}'}`. Every group is complete in one file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from reelquant.checkpoint.safetensors_file import StoredTensor, open_file, write_file
from reelquant.checkpoint.schema import FORMAT_VERSION, check_format_version, layers_from_dict
from reelquant.ops.fake_quantization.reference import LARGEST_INT8
from reelquant.quantization.layer_spec import (
    LAYER_SUFFIXES,
    LayerSpec,
    TensorInfo,
    group_problems,
    layer_digest,
    layer_tensors,
)
from reelquant.quantization.packing import pack_bits
from reelquant.quantization.quantizer import max_code
from reelquant.quantization.weight_grid import GROUP_SIZE, WeightGrid

_METADATA_KEY = "reelquant"


def pack_layer(
    name: str,
    *,
    codes: Tensor,
    grid: WeightGrid,
    bias: Tensor | None,
    activation_bits: int,
    group: str | None = None,
    group_has_channel_scale: bool | None = None,
    group_rotation: int | None = None,
    channel_scale: Tensor | None = None,
    rotation: Tensor | None = None,
    activation_clip: Tensor | None = None,
) -> tuple[dict[str, Tensor], LayerSpec]:
    """The stored tensors, by full name, and the specification of one quantized layer.

    The leader of a group is given the group's tensors. Another member is given the same ones, which it does not store,
    or what describes them: `group_has_channel_scale` and `group_rotation`.

    Args:
        name: the layer's name relative to the transformer.
        codes: `[n, d]` int8, rounded on `grid` (`|code| <= 2**(bits - 1) - 1`).
        grid: scales of the weight that belongs to the transformed input.
        bias: `[n]`, stored in its dtype; None where there is none or the source's is to be kept.
        activation_bits: 4 to 8, or 16 for none.
        group: name of the group's leader; None: this layer.
        group_has_channel_scale: whether the group has a channel scale; None: whether `channel_scale` is given.
        group_rotation: block size of the group's rotation, 0 for none; None: that of `rotation`.
        channel_scale: `[d]`, positive; stored as float32.
        rotation: `[b, b]`, stored as bfloat16: `codes` must belong to the matrix as rounded.
        activation_clip: one positive number, stored as float32; needed when activations are quantized.

    Raises:
        ValueError: shapes, dtypes or values do not fit; all that is wrong is listed.
    """
    suffixes: dict[str, Tensor | None] = {
        "weight_scale": grid.scale.reshape(-1).float(),
        "group_scale": grid.group_scale,
        "channel_scale": None if channel_scale is None else channel_scale.float(),
        "rotation": None if rotation is None else rotation.to(torch.bfloat16),
        "activation_clip": None if activation_clip is None else activation_clip.reshape(-1).float(),
    }
    problems = _part_problems(codes, grid, bias, suffixes)
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))
    suffixes["weight_packed"] = pack_bits(codes.contiguous(), grid.bits)
    draft = LayerSpec(
        weight_bits=grid.bits,
        activation_bits=activation_bits,
        weight_layout="per_channel" if grid.group_scale is None else "two_level",
        group=name if group is None else group,
        channel_scale=channel_scale is not None if group_has_channel_scale is None else group_has_channel_scale,
        rotation=(0 if rotation is None else rotation.shape[0]) if group_rotation is None else group_rotation,
        digest="",
    )
    expected = layer_tensors(name, draft, in_features=codes.shape[1], out_features=codes.shape[0])
    given = {suffix: _on_cpu(tensor) for suffix, tensor in suffixes.items() if tensor is not None}
    stored = {suffix: given[suffix] for suffix in expected if suffix in given}
    problems = [f"{suffix} is not given" for suffix in expected if suffix not in given]
    if draft.group == name:
        problems += [f"{suffix} is given, but the layer has none" for suffix in given if suffix not in expected]
    for suffix, tensor in stored.items():
        info = TensorInfo.of(tensor)
        if info != expected[suffix]:
            problems.append(f"{suffix} is {info}, not {expected[suffix]}")
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))
    tensors = {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
    if bias is not None:
        tensors[f"{name}.bias"] = _on_cpu(bias)
    return tensors, LayerSpec.from_dict({**draft.to_dict(), "digest": layer_digest(stored)})


def write_block_artifact(path: Path, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerSpec]) -> None:
    """Writes the tensors of a block's layers, with the same bytes for the same content.

    Raises:
        ValueError: names every tensor that belongs to no layer and every layer whose digest or group is not right.
        OSError: the file cannot be written.
    """
    problems = group_problems(layers) + _content_problems(tensors, layers, tensors.__getitem__)
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    content = {
        "format_version": FORMAT_VERSION,
        "layers": {name: layers[name].to_dict() for name in sorted(layers)},
    }
    write_file(path, tensors, {_METADATA_KEY: json.dumps(content, sort_keys=True)})


def read_block_artifact(path: Path) -> tuple[dict[str, Tensor], dict[str, LayerSpec]]:
    """Tensors by full name, on the CPU, and layer specifications of a block artifact.

    Raises:
        ValueError: the file is damaged, of a newer format, or no block artifact.
        OSError: the file cannot be read.
    """
    stored, layers = open_block_artifact(path)
    return {name: tensor.read() for name, tensor in stored.items()}, layers


def open_block_artifact(path: Path) -> tuple[dict[str, StoredTensor], dict[str, LayerSpec]]:
    """As `read_block_artifact`, with the tensors left in the file; digests are checked all the same."""
    stored, metadata = open_file(path)
    if _METADATA_KEY not in metadata:
        raise ValueError(
            f"{path}: is no block artifact: its metadata has no {_METADATA_KEY!r}, only {sorted(metadata)}"
        )
    try:
        content = json.loads(metadata[_METADATA_KEY])
    except ValueError as error:
        raise ValueError(f"{path}: its metadata is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its metadata is {content!r}, not an object")
    check_format_version(content.get("format_version"), str(path))
    layers = layers_from_dict(content.get("layers"), str(path))
    problems = _content_problems(stored, layers, lambda name: stored[name].read())
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return stored, layers


def value_problem(suffix: str, tensor: Tensor) -> str | None:
    """What is wrong with the numbers in a layer's tensor: None, or a text. Reads the whole tensor."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        return f"{suffix} has {int((~tensor.isfinite()).sum())} values that are not finite"
    if suffix in ("weight_scale", "group_scale", "channel_scale", "activation_clip") and not bool((tensor > 0).all()):
        return f"{suffix} has {int((tensor <= 0).sum())} values that are not positive"
    return None


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _part_problems(
    codes: Tensor, grid: WeightGrid, bias: Tensor | None, suffixes: Mapping[str, Tensor | None]
) -> list[str]:
    problems = []
    if codes.dtype != torch.int8 or codes.ndim != 2:
        return [f"codes are {codes.dtype}{list(codes.shape)}, not a matrix of int8"]
    largest = max_code(grid.bits)
    # In int16: the absolute value of -128 is no int8.
    if codes.numel() and int(codes.to(torch.int16).abs().max()) > largest:
        problems.append(f"codes reach {int(codes.to(torch.int16).abs().max())}; {grid.bits} bits end at {largest}")
    if grid.group_scale is not None and grid.group_size != GROUP_SIZE:
        problems.append(f"groups of {grid.group_size} inputs cannot be stored, only groups of {GROUP_SIZE}")
    if grid.group_scale is not None and int(grid.group_scale.max()) > LARGEST_INT8 // largest:
        problems.append(f"group_scale reaches {int(grid.group_scale.max())}; it must end at {LARGEST_INT8 // largest}")
    if bias is not None and tuple(bias.shape) != (codes.shape[0],):
        problems.append(f"bias is {list(bias.shape)}, not [{codes.shape[0]}]")
    checked = {**suffixes, "bias": bias}
    found = (value_problem(suffix, tensor) for suffix, tensor in checked.items() if tensor is not None)
    return problems + [problem for problem in found if problem is not None]


def _content_problems(
    names: Iterable[str], layers: Mapping[str, LayerSpec], read: Callable[[str], Tensor]
) -> list[str]:
    problems = []
    by_layer: dict[str, list[str]] = {name: [] for name in layers}
    for name in sorted(names):
        layer, _, suffix = name.rpartition(".")
        if layer in by_layer and suffix in (*LAYER_SUFFIXES, "bias"):
            by_layer[layer].append(suffix)
        else:
            problems.append(f"tensor {name} belongs to no layer of the file")
    for layer, suffixes in by_layer.items():
        digest = layer_digest({suffix: read(f"{layer}.{suffix}") for suffix in suffixes})
        if digest != layers[layer].digest:
            problems.append(f"layer {layer}: its tensors have the digest {digest}, not {layers[layer].digest!r}")
    return problems
