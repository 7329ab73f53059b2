"""The files of a diffusers pipeline folder that its loaders read: one list, which is checked, fingerprinted, copied, verified.

| component | its files |
|---|---|
| model | `config.json`, `generation_config.json` if there, and its safetensors weights: one file, or an index and its shards |
| tokenizer, scheduler, processor | settings, vocabularies and templates: JSON, text and SentencePiece files |

Beside the components only `model_index.json` is read. So pickled weights, variants of the weights that are not asked for, model
cards, hidden files and whatever else lies in a folder are no part of a model. Links to files and folders are followed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

MODEL_INDEX = "model_index.json"
_WEIGHT_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""First part of the names of weight files, by library; other libraries' components are not read."""
_WITHOUT_WEIGHTS = {
    "diffusers": re.compile(r"(Scheduler|Guidance)$"),
    "transformers": re.compile(
        r"(Tokenizer|TokenizerFast|Backend|Processor|ProcessorFast|ProcessorPil|FeatureExtractor)$"
    ),
}
"""Classes that are loaded from settings alone; a class that is not matched is a model, whose weights must be there."""
_TRANSFORMER = re.compile(r"Transformer\w*Model$")
_SETTINGS_ENDINGS = (".json", ".txt", ".jinja", ".model", ".spm", ".bpe", ".codes", ".tiktoken", ".tokenizer", ".vocab")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TEMPLATES = "additional_chat_templates"
_VARIANT = re.compile(r"\.([^.]+?)(?:-\d{5}-of-\d{5})?\.safetensors$")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing, is no JSON, or holds something else; names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def read_components(folder: Path) -> dict[str, tuple[str, str]]:
    """`(library, class)` by component name, from `model_index.json`; components that are null are left out.

    Nothing is imported: only names of diffusers and transformers are let through.

    Raises:
        ValueError: the file cannot be read, or names components that are not of these libraries or lie outside the folder;
            all of them.
    """
    path = folder / MODEL_INDEX
    components, problems = {}, []
    for name, value in read_json(path).items():
        if name.startswith("_") or not isinstance(value, list) or value[:1] == [None]:
            continue
        if Path(name).name != name or name.startswith("."):
            problems.append(f"{path}: {name!r} is not the name of a folder inside the pipeline's")
        elif [type(part) for part in value] != [str, str] or value[0] not in _WEIGHT_STEMS:
            problems.append(
                f"{path}: {name} is {value}; components are [library, class] of {' or '.join(_WEIGHT_STEMS)}"
            )
        else:
            components[name] = (value[0], value[1])
    if problems:
        raise ValueError("; ".join(problems))
    return components


def is_model(library: str, class_name: str) -> bool:
    """Whether a component has weights, by the name of its class."""
    return _WITHOUT_WEIGHTS[library].search(class_name) is None


def transformer_names(components: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """Names of the diffusion transformers among `(library, class)` by component name: `transformer`, and `transformer_2` where
    the later steps have a model of their own."""
    return tuple(
        name for name, (library, cls) in components.items() if library == "diffusers" and _TRANSFORMER.search(cls)
    )


def variant_of(folder: Path, variant: str | None) -> str | None:
    """`variant` if a component's loader takes it from `folder`, None where the loader falls back to the plain weights.

    The rule is that of diffusers (`_identify_model_variants`).
    """
    if variant is None or not folder.is_dir():
        return None
    parts = (path.name.split(".") for path in folder.iterdir())
    return variant if any(len(part) > 1 and part[1].startswith(variant) for part in parts) else None


def weight_map(folder: Path, library: str = "diffusers", *, variant: str | None = None) -> dict[str, list[str]]:
    """Names of the weight files in a component's folder, with the tensors that the index promises in each.

    A model in one file has no index: nothing is promised of it.

    Args:
        variant: such as `fp16`, for the files of that name; taken as `variant_of` says.

    Raises:
        ValueError: there are no safetensors weights, or the index cannot be read or names files outside the folder.
    """
    single, index = _weight_names(folder, library, variant)
    if single.is_file() and (library == "transformers" or not index.is_file()):
        return {single.name: []}
    if not index.is_file():
        raise ValueError(f"{folder}: has neither {single.name} nor {index.name}; {_other_weights(folder)}")
    result: dict[str, list[str]] = {}
    try:
        for name, file in read_json(index)["weight_map"].items():
            result.setdefault(file, []).append(name)
        outside = sorted(file for file in result if Path(file).name != file)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of safetensors files ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{index}: is no index of safetensors files ({error})") from error
    if outside:
        raise ValueError(f"{index}: names files outside its folder: {', '.join(outside)}")
    return dict(sorted(result.items()))


def _other_weights(folder: Path) -> str:
    """What there is in place of the weights, and how to get at them."""
    found = sorted({match[1] for path in folder.glob("*.safetensors") if (match := _VARIANT.search(path.name))})
    if found:
        return f"only the variants {', '.join(found)} are there (model_variant: {found[0]})"
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED) if folder.is_dir() else []
    if pickled:
        return (
            f"only pickled weights are there ({', '.join(pickled)}), which may run code and are not read: take a revision with "
            "safetensors, or load the pipeline where you trust it and write it anew with save_pretrained"
        )
    return "other formats are not read"


def list_files(folder: Path, *, variant: str | None = None) -> tuple[dict[str, Path], list[str]]:
    """The files that the loaders read, by the name that they have in a folder without variants, and what is wrong with them.

    A name is relative to `folder`, with `/` between its parts; `reelquant.json` is never among them.
    """
    try:
        components = read_components(folder)
    except ValueError as error:
        return {}, [str(error)]
    files, problems = {MODEL_INDEX: folder / MODEL_INDEX}, []
    models = [folder / name for name, kind in components.items() if is_model(*kind)]
    if variant is not None and not any(variant_of(inside, variant) for inside in models):
        problems.append(
            f"{folder}: model_variant is {variant}, but no component has weights of it{_variants(models)}: leave it out, or "
            "set one that is there"
        )
    for name, (library, class_name) in components.items():
        inside = folder / name
        if not inside.is_dir():
            problems.append(f"{folder} lacks the folder {name}/ that {MODEL_INDEX} names")
        elif is_model(library, class_name):
            found, wrong = _model_files(inside, library, variant)
            files.update({f"{name}/{file}": path for file, path in found.items()})
            problems += wrong
        else:
            found = _settings_files(inside)
            files.update({f"{name}/{file}": path for file, path in found.items()})
            needed = "scheduler_config.json" if class_name.endswith("Scheduler") else None
            if needed is not None and needed not in found:
                problems.append(f"{inside / needed} is missing")
            elif not found:
                problems.append(f"{inside} holds none of the files from which a {class_name} is loaded")
    return dict(sorted(files.items(), key=lambda item: PurePosixPath(item[0]).parts)), problems


def _variants(folders: Iterable[Path]) -> str:
    """The variants that some components have."""
    files = (path for folder in folders for path in folder.glob("*.safetensors"))
    found = sorted({match[1] for path in files if (match := _VARIANT.search(path.name))})
    return f" (there are {', '.join(found)})" if found else ""


def plain_name(name: str, variant: str | None) -> str:
    """The name of a variant's weight file in a folder without variants."""
    return name if variant is None else name.replace(f".{variant}", "", 1)


def plain_index(path: Path, variant: str | None) -> dict[str, Any]:
    """The index of a variant's shards with the names that these have in a folder without variants."""
    index = read_json(path)
    return {**index, "weight_map": {name: plain_name(file, variant) for name, file in index["weight_map"].items()}}


def fingerprint(checksums: Mapping[str, str]) -> str:
    """128 bits of a hash over the SHA-256 of files by name, in the order of the names' parts."""
    digest = hashlib.sha256()
    for name in sorted(checksums, key=lambda name: PurePosixPath(name).parts):
        digest.update(f"{name}\0{checksums[name]}\n".encode())
    return digest.hexdigest()[:32]


def _weight_names(folder: Path, library: str, variant: str | None) -> tuple[Path, Path]:
    taken = variant_of(folder, variant)
    middle = "" if taken is None else f".{taken}"
    stem = _WEIGHT_STEMS[library]
    return folder / f"{stem}{middle}.safetensors", folder / f"{stem}.safetensors.index{middle}.json"


def _model_files(folder: Path, library: str, variant: str | None) -> tuple[dict[str, Path], list[str]]:
    files = {name: folder / name for name in ("config.json", "generation_config.json") if (folder / name).is_file()}
    problems = [] if "config.json" in files else [f"{folder / 'config.json'} is missing"]
    if library == "transformers" and (folder / "adapter_config.json").exists():
        problems.append(
            f"{folder / 'adapter_config.json'}: its loader adds an adapter: merge it into the weights, or remove it"
        )
    try:
        shards = weight_map(folder, library, variant=variant)
    except ValueError as error:
        return files, [*problems, str(error)]
    single, index = _weight_names(folder, library, variant)
    names = list(shards) if single.name in shards and not shards[single.name] else [index.name, *shards]
    for name in names:
        if (folder / name).is_file():
            files[plain_name(name, variant_of(folder, variant))] = folder / name
        else:
            problems.append(f"{folder / name} is missing, though the index names it")
    return files, problems


def _settings_files(folder: Path) -> dict[str, Path]:
    paths = [*folder.iterdir(), *(folder / _TEMPLATES).glob("*.jinja")]
    return {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if path.name.endswith(_SETTINGS_ENDINGS) and not path.name.startswith(".") and path.is_file()
    }
