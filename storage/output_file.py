"""One file that a unit wrote, as its record lists it."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from storage.atomic_files import sha256_file


@dataclass(frozen=True)
class OutputFile:
    """One file that a unit wrote."""

    path: str
    """Relative to the run directory, POSIX, inside it."""
    num_bytes: int
    checksum: str
    """SHA-256, 64 hex digits."""
    e_tag: str | None = None
    """What an object store called this content when it took it; None in a file system. The same tag means the same content."""

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        if not parts or self.path.startswith("/") or ".." in parts or "\0" in self.path:
            raise ValueError(f"output path {self.path!r} must be relative and stay inside the run directory")

    @classmethod
    def describe(cls, path: Path, *, run: "str | os.PathLike[str]") -> "OutputFile":
        """Describe the finished file ``path`` relative to ``run``."""
        return cls(path.relative_to(run).as_posix(), path.stat().st_size, sha256_file(path))
