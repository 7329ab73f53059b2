"""The operations that a run needs of the place where it lies, and nothing more; one implementation a kind of place.

    storage.local_store  a folder, on a local disk or a shared file system: fsync, rename, flock
    storage.s3_store     a prefix of an S3 bucket: whole objects, conditional put, a lease

Names are keys: relative POSIX paths inside the run. What both promise:

- a file is whole or absent, and durable when the call returns; nothing is ever appended to, or changed in part;
- an exclusive put has one winner among all processes on all machines;
- of two writers of one name, the last one stands, whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage.location import Location
from storage.output_file import OutputFile

WriteLocally = Callable[[Path], object]
"""Writes one file, or one folder of files, at the local path that it is given, which does not exist."""


class RunLocked(ValueError):
    """Another driver works on this run."""


class StoreUnreachable(OSError):
    """The store did not answer for longer than an outage may last."""


class LeaseLost(OSError):
    """Another driver has taken the run over; this one must not write any more."""


@dataclass(frozen=True)
class StoredFile:
    """What a store knows of a file without reading it."""

    num_bytes: int
    identity: Hashable
    """Changes with the content, in this process's lifetime at least."""
    e_tag: str | None = None
    """Of an object; None in a file system."""
    mtime_ns: int | None = None
    """When the content last changed, in a file system; None for an object, whose e_tag says more."""


@dataclass(frozen=True)
class Driver:
    """Who drives a run, as far as can be seen from outside."""

    at_work: str | None
    """Names the driver that holds the run."""
    died: str | None
    """Names a driver that ended without giving the run back."""


class LineLog(Protocol):
    """A text log with one writer."""

    def append(self, line: str) -> None:
        """Add a line, which may become visible to others a few seconds later."""

    def close(self) -> None:
        """Make everything visible."""


class RunStore(Protocol):
    """Where one run lies."""

    @property
    def location(self) -> Location:
        """Where."""

    @property
    def num_requests(self) -> int:
        """So many operations are worth having under way at a time; 1: another one does not make them faster."""

    def read(self, key: str) -> bytes:
        """The whole content. Raises FileNotFoundError."""

    def stat(self, key: str) -> StoredFile:
        """Raises FileNotFoundError; ValueError for a link that leads out of the run."""

    def listed(self) -> contextlib.AbstractContextManager[None]:
        """For the body's time, :meth:`stat` may answer from what was there at its beginning: many requests become one."""

    def checksum(self, key: str) -> str:
        """SHA-256 of a file, which is read for it; 64 hex digits. Raises FileNotFoundError."""

    def put(self, key: str, data: bytes, *, exclusive: bool = False) -> OutputFile:
        """Write a small file. With ``exclusive``, raises FileExistsError if there is one."""

    def put_record(self, key: str, data: bytes, *, is_newer: Callable[[bytes], bool]) -> None:
        """Write a file that a driver which was ousted must not overwrite.

        Args:
            key: where.
            data: the content.
            is_newer: whether an existing content is of a later driver than ``data``; a store with a lock that
                dies with its holder never asks.

        Raises:
            LeaseLost: there is one.
        """

    def publish(
        self, key: str, write: WriteLocally, *, last: str | None = None, num_bytes: int | None = None
    ) -> tuple[OutputFile, ...]:
        """Have ``write`` make a file or a folder locally, and put it at ``key``.

        Args:
            key: of the file, or of the folder.
            write: see :data:`WriteLocally`; what stood at ``key`` before is there until it is done.
            last: the file of a folder without which the folder means nothing: absent until all others are there.
            num_bytes: about to be written. An OSError of writing locally then names them, the place and the bytes free.
        """

    def adopt(self, outputs: Sequence[OutputFile], source: RunStore) -> tuple[OutputFile, ...]:
        """Have files of another store of the same kind under the same names: linked in a folder, copied by the server in a
        bucket. Neither store may ever change them in place.

        Args:
            outputs: as ``source`` has them, which was seen to be so.
            source: its runs lie on the same file system or in the same bucket, or files are copied through here.

        Returns:
            the same, as they lie here.

        Raises:
            ValueError: the source's file is not the one described (any more); says which. Nothing may be built on the others.
        """

    def local_files(self, keys: Sequence[str]) -> contextlib.AbstractContextManager[list[Path]]:
        """Local paths with the content of files, to be read only, for the body's time; in a folder, the files themselves.

        Raises FileNotFoundError.
        """

    def local_folder(self, key: str) -> Path:
        """The same for a folder, until this process ends or asks for another one. Raises FileNotFoundError."""

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, sorted; unfinished ones left out, empty if there is no folder."""

    def subfolders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder, sorted; unfinished ones left out."""

    def remove(self, key: str) -> None:
        """Remove a file durably; fine if there is none."""

    def num_bytes(self) -> int:
        """Of all files of the run."""

    def sweep(self) -> tuple[str, ...]:
        """Remove what killed writers left, while holding the lock; returns the keys."""

    def check_key(self, folder: str, name: str) -> None:
        """Raises ValueError if ``name`` inside ``folder`` leads through a symbolic link."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Be the run's only driver. Raises RunLocked, naming the other one."""

    def driver(self) -> Driver:
        """Who drives the run; changes nothing."""

    @property
    def epoch(self) -> int:
        """Counts the drivers of a run whose lock may be taken over from one that only seems dead; 0: it cannot be."""

    def open_log(self, folder: str, name: str) -> LineLog:
        """The log ``name`` in ``folder``, for its writer, which holds the lock."""

    def read_log(self, folder: str, name: str) -> Iterator[str]:
        """Its lines, oldest first; empty if there is none."""
