"""Where files of runs and caches lie, and the few operations that are needed there.

    storage.folder  a folder on a local disk or a shared file system
    storage.bucket  a prefix of an S3 bucket

Names are keys: relative POSIX paths. A file is whole or absent, and durable when the call returns; an exclusive put has one
winner among all processes on all machines. Large files are made locally and published as they are (:meth:`Place.publish`),
and read as local files (:meth:`Place.local`): a bucket is transport, not a second file system.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage.location import Location
from storage.output_file import OutputFile

WriteLocally = Callable[[Path], object]
"""Writes one file, or one folder of files, at the local path that it is given, which does not exist."""


class StoreUnreachable(OSError):
    """The bucket did not answer for longer than an outage may last."""


@dataclass(frozen=True)
class FileState:
    """State of a file, known without reading it."""

    num_bytes: int
    e_tag: str | None = None
    """Of an object; None in a file system."""
    mtime_ns: int | None = None
    """When the content last changed, in a file system; None for an object, whose e_tag says more."""


class Place(Protocol):
    """A folder, or a prefix of a bucket."""

    @property
    def location(self) -> Location:
        """Its location."""

    def read(self, key: str) -> bytes:
        """The whole content. Raises FileNotFoundError."""

    def put(self, key: str, data: bytes, *, exclusive: bool = False) -> None:
        """Write a small file. With ``exclusive``, raises FileExistsError if there is one of another content."""

    def stat(self, key: str) -> FileState:
        """Raises FileNotFoundError; ValueError for a link that leads out."""

    def listed(self, folder: str = "") -> contextlib.AbstractContextManager[None]:
        """For the body's time, what is asked of the files below a folder may be answered from what was there at its beginning:
        many requests become one."""

    def checksum(self, key: str) -> str:
        """SHA-256 of a file, which is read for it; 64 hex digits. Raises FileNotFoundError."""

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly in a folder, sorted; empty if there is no folder."""

    def subfolders(self, folder: str = "") -> list[str]:
        """Names of the folders directly in a folder, sorted; unfinished ones left out."""

    def files(self, folder: str = "") -> list[tuple[str, int, float]]:
        """Key, bytes and time of the last change (seconds since 1970) of every file below a folder."""

    def remove(self, key: str) -> None:
        """Remove a file, or a folder with all in it, durably; fine if there is none."""

    def workshop(self, key: str) -> contextlib.AbstractContextManager[Path]:
        """A local folder, not made yet, for the files of the folder ``key``; what is not published goes with the context."""

    def publish(self, workshop: Path, key: str, outputs: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
        """Make the files of a workshop those of the folder ``key``; they are described already, and synced."""

    def put_folder(self, key: str, write: WriteLocally, *, last: str) -> tuple[OutputFile, ...]:
        """Have ``write`` make a folder locally and replace the folder ``key`` by it; the file ``last`` comes last."""

    def local(self, key: str, outputs: Sequence[OutputFile], scratch: Path) -> Path:
        """The folder ``key`` with these files as a local one: itself, or a verified copy below ``scratch``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file that was copied is not the one described.
        """

    def copied(self, scratch: Path) -> Path:
        """All files as a local folder: itself, or a copy below ``scratch`` that nobody has verified."""
