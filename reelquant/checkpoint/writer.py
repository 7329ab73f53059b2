"""Assembly of a checkpoint: a diffusers pipeline folder whose transformers, one or two, have quantized layers.

One file of weights is in memory at a time, never the model. The same inputs give the same bytes. `model_index.json`, without
which no loader takes the folder, is written when all other files of the components are there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.checkpoint.file_digests import DIGESTS_NAME, describe_files
from reelquant.checkpoint.inference_specs import VelocityCorrection
from reelquant.checkpoint.layer_packing import open_block_artifact
from reelquant.checkpoint.pipeline_files import MODEL_INDEX, list_files, plain_index, read_components, transformer_names
from reelquant.checkpoint.reader import SECOND_TRANSFORMER, TRANSFORMER, is_checkpoint, read_config, read_weights
from reelquant.checkpoint.safetensors_file import StoredTensor, write_file
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.quantization.layer_spec import LAYER_SUFFIXES, LayerSpec, group_problems, layer_tensors
from reelquant.settings.generation import StepProtection

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Calibrated:
    """The result of the calibration for one transformer."""

    artifacts: Iterable[Path]
    """Files of `layer_packing.write_block_artifact`; tensors of the source that none replaces are copied."""
    sparse_attention: SparseAttentionSpec | None = None
    velocity_correction: VelocityCorrection | None = None


@dataclass(frozen=True)
class _Prepared:
    """A transformer's folder before it is written."""

    config: Mapping[str, Any]
    spec: QuantizationSpec
    tensors: Mapping[str, StoredTensor]


def write_checkpoint(
    source: Path,
    output: Path,
    *,
    artifacts: Iterable[Path],
    bits: str,
    method: str,
    variant: str | None = None,
    calibration: Mapping[str, Any] | None = None,
    sparse_attention: SparseAttentionSpec | None = None,
    step_protection: StepProtection | None = None,
    velocity_correction: VelocityCorrection | None = None,
    second: Calibrated | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> QuantizationSpec:
    """Writes the pipeline folder `output` from the pipeline folder `source` and the quantized layers of `artifacts`.

    The other components are copied, of each the files that its loader reads (`pipeline_files`) and no others. Digests of all
    files go into `reelquant.json`.

    Args:
        source: a diffusers pipeline folder with safetensors weights that are not quantized.
        output: a new folder; it is not there if an error is raised.
        artifacts: files of `layer_packing.write_block_artifact`; tensors of the source that none replaces are copied.
        bits: label such as `W4A6`.
        method: name of the calibration method.
        variant: of the source's weight files, such as `fp16`; the checkpoint's have plain names.
        calibration: JSON values: where the layers come from.
        sparse_attention, step_protection, velocity_correction: of the generation, None for none.
        second: of `transformer_2`, where the source has one; what is said before is of `transformer`, but for the protected
            steps, which are of both.
        max_shard_bytes: size of the weight files, and the memory that writing them takes; a larger tensor has a file of its
            own.

    Returns:
        the description that was written into the `config.json` of `transformer`.

    Raises:
        ValueError: the source or an artifact is not usable, they do not fit each other, or `output` is something else;
            all layers and tensors that do not fit are named.
        OSError: files cannot be read or written.
    """
    source, output = source.resolve(), output.resolve()
    check_place(source, output)
    if output.exists():
        raise ValueError(f"{output}: is there already; choose another folder or remove it")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    parts = {TRANSFORMER: Calibrated(artifacts, sparse_attention, velocity_correction)}
    if second is not None:
        parts[SECOND_TRANSFORMER] = second
    common = QuantizationSpec(bits, method, {}, dict(calibration or {}), step_protection=step_protection)
    prepared: dict[str, _Prepared] = {}
    files, problems = _other_files(source, parts, variant)
    for name, part in parts.items():
        prepared[name], found = _prepare(source / name, part, common, variant)
        problems += found if second is None else [f"{name}: {problem}" for problem in found]
    if problems:
        raise ValueError(f"{source} and its block artifacts give no checkpoint: " + "; ".join(problems))
    try:
        for name, of in prepared.items():
            (output / name).mkdir(parents=True)
            _write_json(output / name / "config.json", {**of.config, "quantization_config": of.spec.to_dict()})
            _write_shards(output / name, of.tensors, max_shard_bytes)
        _copy_files(files, output, variant)
        _write_json(output / DIGESTS_NAME, describe_files(output))
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return prepared[TRANSFORMER].spec


def check_place(source: Path, output: Path) -> None:
    """Refuses a folder that a checkpoint of `source` must not be put at, in place of what is there.

    Raises:
        ValueError: `source` is no pipeline folder, or `output` is the source, is in it or has it inside, or is something else
            than a checkpoint of this package.
    """
    if not (source / MODEL_INDEX).is_file():
        raise ValueError(f"{source}: is no diffusers pipeline folder: it has no {MODEL_INDEX}")
    if output == source or output.is_relative_to(source) or source.is_relative_to(output):
        raise ValueError(f"{output}: the checkpoint cannot be written over or into its source {source}")
    if output.exists() and not is_checkpoint(output):
        raise ValueError(f"{output}: exists and is no checkpoint of reelquant; choose another folder or remove it")


def _prepare(
    folder: Path, part: Calibrated, common: QuantizationSpec, variant: str | None
) -> tuple[_Prepared, list[str]]:
    """A transformer of the source with its quantized layers, and the problems of its files.

    Args:
        common: the description without the transformer's own parts.
    """
    config = read_config(folder)
    if config.get("quantization_config") is not None:
        raise ValueError(f"{folder.parent}: its {folder.name} is quantized already; give the full-precision pipeline")
    weights, problems = read_weights(folder, variant=variant, alone=False)
    layers, replacements, artifact_problems = _read_artifacts(part.artifacts)
    problems += artifact_problems
    if not problems:
        problems = group_problems(layers) + _fit_problems(weights, replacements, layers)
    # A layer's weight gives way; its bias stays, unless the artifact has one.
    replaced = {f"{layer}.weight" for layer in layers}
    kept = {name: tensor for name, tensor in weights.items() if name not in replaced}
    spec = replace(
        common,
        layers=layers,
        sparse_attention=part.sparse_attention,
        velocity_correction=part.velocity_correction,
    )
    return _Prepared(config, spec, {**kept, **replacements}), problems


def _read_artifacts(
    artifacts: Iterable[Path],
) -> tuple[dict[str, LayerSpec], dict[str, StoredTensor], list[str]]:
    layers: dict[str, LayerSpec] = {}
    tensors: dict[str, StoredTensor] = {}
    origin: dict[str, Path] = {}
    problems = []
    for path in artifacts:
        try:
            found, specs = open_block_artifact(path)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        problems += [f"layer {name}: is in {origin[name]} and in {path}" for name in specs if name in origin]
        layers.update(specs)
        tensors.update(found)
        origin.update(dict.fromkeys(specs, path))
    if not layers and not problems:
        problems.append("the artifacts hold no layer")
    return layers, tensors, problems


def _fit_problems(
    weights: Mapping[str, StoredTensor], replacements: Mapping[str, StoredTensor], layers: Mapping[str, LayerSpec]
) -> list[str]:
    problems = []
    for name, spec in layers.items():
        weight = weights.get(f"{name}.weight")
        if weight is None or len(weight.info.shape) != 2:
            found = "no such weight" if weight is None else f"the weight {weight.info}, which is no matrix"
            problems.append(f"layer {name}: the source has {found}")
            continue
        out_features, in_features = weight.info.shape
        expected = layer_tensors(name, spec, in_features=in_features, out_features=out_features)
        for suffix in LAYER_SUFFIXES:
            tensor, info = replacements.get(f"{name}.{suffix}"), expected.get(suffix)
            if (tensor.info if tensor else None) != info:
                problems.append(f"tensor {name}.{suffix}: is {tensor.info if tensor else None}, not {info}")
        if spec.rotation and in_features % spec.rotation:
            problems.append(f"layer {name}: rotation blocks of {spec.rotation} do not divide its {in_features} inputs")
        bias, old = replacements.get(f"{name}.bias"), weights.get(f"{name}.bias")
        if bias is not None and (old is None or bias.info.shape != old.info.shape):
            problems.append(f"tensor {name}.bias: is {bias.info}, the source has {old.info if old else None}")
    return problems


def _other_files(source: Path, quantized: Iterable[str], variant: str | None) -> tuple[dict[str, Path], list[str]]:
    """All files of a source but those of the transformers `quantized`, which are written anew; and what it lacks."""
    files, problems = list_files(source, variant=variant)
    if not problems:
        problems = [
            f"{source / MODEL_INDEX} names no {name}" for name in quantized if f"{name}/config.json" not in files
        ]
        names = transformer_names(read_components(source))
        others = [name for name in names if name not in quantized and name.startswith(TRANSFORMER)]
        problems += [f"{name} is a transformer too, and would stay in 16 bits" for name in others]
    return {name: path for name, path in files.items() if name.split("/")[0] not in quantized}, problems


def _copy_files(files: Mapping[str, Path], target: Path, variant: str | None) -> None:
    """Copies files to their names inside `target`; indexes of a variant are rewritten for the plain names."""
    for name, path in sorted(files.items(), key=lambda item: item[0] == MODEL_INDEX):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors.index.json") and path.name != Path(name).name:
            _write_json(target / name, plain_index(path, variant))
            continue
        shutil.copyfile(path, target / name)


def _write_shards(folder: Path, tensors: Mapping[str, StoredTensor], max_shard_bytes: int) -> None:
    split = split_state_dict_into_shards_factory(
        {name: tensors[name] for name in sorted(tensors)},
        get_storage_size=lambda tensor: tensor.info.num_bytes,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: tensors[name].read() for name in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
