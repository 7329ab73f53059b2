"""SHA-256 of all files of a checkpoint's components, in `reelquant.json` beside `model_index.json`.

    {"format_version": 1, "files": {"vae/config.json": "<64 hexadecimal digits>", ...}}

A loader does not read it. `save_pretrained` does not write it: then nothing but the quantized layers has digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reelquant.checkpoint.pipeline_files import list_files, read_json

DIGESTS_NAME = "reelquant.json"
FORMAT_VERSION = 1


def sha256_of_files(files: Mapping[str, Path]) -> dict[str, str]:
    """Hexadecimal SHA-256 of files, by the name that they are given; several are read at once.

    Raises:
        OSError: a file cannot be read.
    """
    with ThreadPoolExecutor() as readers:  # a large model is some files of 5 GB
        return dict(zip(files, readers.map(_sha256, files.values()), strict=True))


def describe_files(folder: Path) -> dict[str, Any]:
    """The content of `reelquant.json` for the checkpoint in `folder`.

    Raises:
        ValueError: a component that `model_index.json` names is not there in full.
    """
    files, problems = list_files(folder)
    if problems:
        raise ValueError("; ".join(problems))
    return {"format_version": FORMAT_VERSION, "files": sha256_of_files(files)}


def read_digests(folder: Path) -> dict[str, str] | None:
    """The digests in `folder`'s `reelquant.json` by file name; None where there is no such file.

    Raises:
        ValueError: the file cannot be used, or is of a newer format.
    """
    path = folder / DIGESTS_NAME
    if not path.exists():
        return None
    content = read_json(path)
    version, files = content.get("format_version"), content.get("files")
    if not isinstance(version, int) or not isinstance(files, dict):
        raise ValueError(f"{path}: has no format_version and files: it is not one of reelquant, or damaged")
    if version > FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {version} is newer than {FORMAT_VERSION}, which this reelquant reads")
    return {str(name): str(digest) for name, digest in files.items()}


def digest_problems(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Files in `folder` that are missing, have changed, or lie in a component though `reelquant.json` does not list them.

    Files beside the components, such as a model card, are nobody's concern; so are hidden ones.
    """
    files = {name: folder / name for name in digests if _is_inside(name) and (folder / name).is_file()}
    found = sha256_of_files(files)
    problems = [f"file {name}: is missing" for name in digests if name not in files]
    problems += [f"file {name}: has changed since it was written" for name in found if found[name] != digests[name]]
    parts = {name.split("/")[0] for name in digests if _is_inside(name) and "/" in name}
    there = (path for part in sorted(parts) for path in sorted((folder / part).rglob("*")) if path.is_file())
    names = (path.relative_to(folder) for path in there)
    visible = (name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    return problems + [f"file {name}: is no part of the checkpoint" for name in visible if name not in digests]


def _is_inside(name: str) -> bool:
    """A name comes from a file: it leads nowhere else."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
