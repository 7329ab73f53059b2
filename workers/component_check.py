"""Whether the components of a pipeline are what their classes need, found with the loaders' own rules before any work.

Models are loaded on the meta device, tokenizers and other settings really: the libraries know themselves which tensors may be
missing, tied or renamed. Classes are taken from diffusers and transformers alone, and no code of a model's folder is run.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from reelquant.checkpoint.file_digests import sha256_of_files
from reelquant.checkpoint.pipeline_files import (
    MODEL_INDEX,
    fingerprint,
    is_model,
    list_files,
    read_components,
    read_json,
    transformer_names,
    variant_of,
    weight_map,
)
from reelquant.checkpoint.safetensors_file import ScannedFile, scan_file
from reelquant.diffusers_internals import optional_components
from reelquant.families.family import ImageUse
from workers.pipeline_call import CALL_ARGUMENTS, guider_problem, set_elsewhere

_SHOWN_TENSORS = 8
_PLANNED = ("transformer", "vae")
"""Components without which nothing can be planned; a folder to plan with may lack tokenizers and the like."""


def structure_problems(model: Path) -> list[str]:
    """What is wrong with a pipeline folder by its settings alone: its index, its classes, JSON files that cannot be read."""
    try:
        components = read_components(model)
    except ValueError as error:
        return [str(error)]
    problems = _pipeline_problems(model, components)
    for name, (library, class_name) in components.items():
        if not isinstance(getattr(importlib.import_module(library), class_name, None), type):
            problems.append(f"{model / MODEL_INDEX}: {library} {_version(library)} has no class {class_name} ({name})")
        for path in (model / name / "config.json", model / name / "scheduler_config.json"):
            if path.is_file():
                problems += _json_problems(path)
    return problems


def component_problems(model: Path, *, variant: str | None) -> tuple[list[str], str]:
    """What is wrong with the files of all components, and the fingerprint of the model: every byte is read once.

    Args:
        variant: of the weight files.
    """
    files, problems = list_files(model, variant=variant)
    if not files:
        return problems, ""
    problems += [*_lacking_components(model), *(_nameless(model) if variant is not None else ())]
    problems += [problem for path in files.values() if path.suffix == ".json" for problem in _json_problems(path)]
    weights = {name: path for name, path in files.items() if path.suffix == ".safetensors"}
    checksums = sha256_of_files({name: path for name, path in files.items() if name not in weights})
    scanned: dict[Path, ScannedFile] = {}
    with ThreadPoolExecutor() as readers:
        futures = {name: readers.submit(scan_file, path) for name, path in weights.items()}
    for name, future in futures.items():
        try:
            found = scanned[weights[name]] = future.result()
        except (ValueError, OSError) as error:
            problems.append(f"{weights[name]} cannot be read (truncated or damaged): {error}")
            continue
        checksums[name] = found.sha256
    components = read_components(model)
    transformers = transformer_names(components)
    for name, (library, class_name) in components.items():
        folder = model / name
        if not folder.is_dir() or any(f"{folder}{end}" in problem for problem in problems for end in "/: "):
            continue  # its loader would say the same in other words
        component_class: Any = getattr(importlib.import_module(library), class_name, None)
        if not isinstance(component_class, type):
            continue
        if is_model(library, class_name):
            own = {path: file for path, file in scanned.items() if path.parent == folder}
            problems += _index_problems(folder, library, variant, own)
            problems += _tensor_problems(component_class, folder, variant, own, strict=name in transformers)
        else:
            problems += _settings_problems(component_class, folder)
    problems += [
        f"{path} holds NaN or infinite weights in {_some(found.non_finite)}"
        for path, found in scanned.items()
        if found.non_finite
    ]
    return problems, "" if problems else fingerprint(checksums)


def _pipeline_problems(model: Path, components: Mapping[str, tuple[str, str]]) -> list[str]:
    """Whether the pipeline's class exists and can be called as a run calls it, and whether there is a model in it."""
    index = model / MODEL_INDEX
    pipeline_class = pipeline_class_of(model)
    if pipeline_class is None:
        name = read_json(index).get("_class_name")
        return [f"{index}: _class_name is {name!r}: diffusers {diffusers.__version__} has no such pipeline"]
    problems = [f"{index}: names no {part}" for part in _PLANNED if part not in components]
    image = () if pipeline_inputs(model).image == "none" else ("image",)
    try:
        given = {*image, *CALL_ARGUMENTS} - set_elsewhere(pipeline_class).keys()
        inspect.signature(pipeline_class.__call__).bind(None, **dict.fromkeys(given))
    except TypeError as error:
        problems.append(
            f"{index}: _class_name is {pipeline_class.__name__}, which is not called as pipelines are that make a video from a "
            f"text, or a text and an image ({error}): give the folder of a text-to-video or image-to-video model"
        )
    return problems


@dataclass(frozen=True)
class PipelineInputs:
    """What the call of a model's pipeline takes beside a prompt."""

    name: str
    """The pipeline's class."""
    image: ImageUse
    """Diffusers' pipelines from an image are called so, or have an argument for it without a default."""
    negative_prompt: bool


def pipeline_inputs(model: Path) -> PipelineInputs:
    """Inputs of the pipeline in `model`, whose class diffusers has."""
    pipeline_class = pipeline_class_of(model)
    parameters, name = inspect.signature(pipeline_class.__call__).parameters, pipeline_class.__name__
    found = parameters.get("image")
    needed = found is not None and (found.default is found.empty or "ImageToVideo" in name)
    return PipelineInputs(
        name, "none" if found is None else "needed" if needed else "optional", "negative_prompt" in parameters
    )


def pipeline_class_of(model: Path) -> Any:
    """The pipeline's class by its index; None where diffusers has none of that name."""
    name = read_json(model / MODEL_INDEX).get("_class_name")
    with _silent():  # its import says which backend transformers takes for images
        found: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline) else None


def _lacking_components(model: Path) -> list[str]:
    """Components that the pipeline's class needs and `model_index.json` does not name."""
    pipeline_class = pipeline_class_of(model)
    if pipeline_class is None:
        return []
    parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
    needed = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    lacking = needed - set(read_components(model)) - optional_components(pipeline_class) - set(_PLANNED)
    name = pipeline_class.__name__
    return [f"{model / MODEL_INDEX}: names no {part}, which {name} needs" for part in sorted(lacking)]


def _nameless(model: Path) -> list[str]:
    """Files over which diffusers stumbles where it looks for a variant (`_identify_model_variants`)."""
    inside = (path for name in read_components(model) if (model / name).is_dir() for path in (model / name).iterdir())
    found = [str(path) for path in inside if "." not in path.name]
    return [f"{path}: diffusers takes no variant beside a file without an ending: move it away" for path in found]


def _index_problems(
    folder: Path, library: str, variant: str | None, scanned: Mapping[Path, ScannedFile]
) -> Iterator[str]:
    """Tensors that an index promises in a file that does not hold them."""
    for file, promised in weight_map(folder, library, variant=variant).items():
        found = scanned.get(folder / file)
        if found is not None and (lacking := sorted(set(promised) - set(found.tensors))):
            yield f"{folder / file} lacks {_some(lacking)}, though the index promises that"


def _tensor_problems(
    model_class: Any, folder: Path, variant: str | None, scanned: Mapping[Path, ScannedFile], *, strict: bool
) -> list[str]:
    """Names and shapes of a model's tensors against its class.

    Args:
        strict: tensors without a use are wrong too.
    """
    if "quantization_config" in read_json(folder / "config.json"):
        return []  # its quantizer knows the tensors
    extra = {} if (taken := variant_of(folder, variant)) is None else {"variant": taken}
    try:
        with _silent():
            _, info = model_class.from_pretrained(
                str(folder),
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                local_files_only=True,
                **extra,
            )
    except Exception as error:  # noqa: BLE001 - whatever a loader raises, it would raise in every worker
        return [f"{folder}: no {model_class.__name__} can be built from it: {_first_line(error)}"]
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(f"{folder} lacks the tensors {_some(missing)} of a {model_class.__name__} of its config.json")
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        file = next((path for path, found in scanned.items() if name in found.tensors), folder)
        problems.append(
            f"{file}: tensor {name} has the shape {list(stored)}, but its config.json makes it {list(wanted)}"
        )
    if strict and (unused := sorted(info["unexpected_keys"])):
        problems.append(
            f"{folder} holds tensors that a {model_class.__name__} of its config.json lacks: {_some(unused)}"
        )
    return problems


def _settings_problems(component_class: Any, folder: Path) -> list[str]:
    try:
        with _silent():
            loaded = component_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # noqa: BLE001 - whatever a loader raises, it would raise in every worker
        return [f"{folder}: no {component_class.__name__} can be loaded from it: {_first_line(error)}"]
    problem = guider_problem(loaded) if folder.name == "guider" else None
    return [] if problem is None else [f"{folder}: {problem}"]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Neither bars nor warnings of the libraries: what they say of missing tensors is said here."""
    from transformers.utils import logging as transformers_logging

    logs = (diffusers.utils.logging, transformers_logging)
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity(log.CRITICAL)
            log.disable_progress_bar()
        yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def _json_problems(path: Path) -> list[str]:
    try:
        read_json(path)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _version(library: str) -> str:
    return str(importlib.import_module(library).__version__)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    rest = len(listed) - _SHOWN_TENSORS
    return ", ".join(listed[:_SHOWN_TENSORS]) + (f" and {rest} more" if rest > 0 else "")
