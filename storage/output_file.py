"""One file that a unit wrote, as its record lists it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from storage.atomic_files import sha256_file

_HASHED = 4
"""Files that are hashed at a time, from the page cache: a core each."""


@dataclass(frozen=True)
class OutputFile:
    """One file that a unit wrote."""

    path: str
    """Relative to the folder of the unit's attempt, POSIX, inside it."""
    num_bytes: int
    checksum: str
    """SHA-256, 64 hex digits."""
    e_tag: str | None = None
    """Name that an object store gave this content when it took it; None in a file system. Equal tags mean equal content."""

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        if not parts or self.path.startswith("/") or ".." in parts or "\0" in self.path:
            raise ValueError(f"output path {self.path!r} must be relative and stay inside its folder")


def describe_files(path: Path, *, base: Path | None = None) -> tuple[OutputFile, ...]:
    """Describe a finished file, or all files of a finished folder.

    Args:
        path: the file or folder.
        base: paths are relative to it; None: to the folder.
    """
    files = sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]
    above = base or path
    with ThreadPoolExecutor(_HASHED, thread_name_prefix="sha256") as pool:
        checksums = list(pool.map(sha256_file, files))
    return tuple(
        OutputFile(file.relative_to(above).as_posix(), file.stat().st_size, checksum)
        for file, checksum in zip(files, checksums, strict=True)
    )
