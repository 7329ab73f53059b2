"""A folder on a local disk or a shared file system: fsync, rename, link."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from storage.atomic_files import (
    PARTIAL_SUFFIX,
    atomic_path,
    create_directory,
    remove_folder,
    sha256_file,
    sync_directory,
    write_bytes_atomic,
)
from storage.output_file import OutputFile, describe_files
from storage.place import FileState, WriteLocally


class Folder:
    """See :class:`storage.place.Place`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def location(self) -> Path:
        return self._root

    def read(self, key: str) -> bytes:
        try:
            return (self._root / key).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from error

    def put(self, key: str, data: bytes, *, exclusive: bool = False) -> None:
        path = self._root / key
        create_directory(path.parent)
        write_bytes_atomic(path, data, exclusive=exclusive)

    def stat(self, key: str) -> FileState:
        path = self._root / key
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if not path.resolve().is_relative_to(self._root.resolve()):
            raise ValueError(f"a link out of {self._root}")
        found = path.stat()
        return FileState(found.st_size, mtime_ns=found.st_mtime_ns)

    def listed(self, folder: str = "") -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def checksum(self, key: str) -> str:
        return sha256_file(self._root / key)

    def names(self, folder: str = "") -> list[str]:
        return self._entries(folder, lambda entry: entry.is_file())

    def subfolders(self, folder: str = "") -> list[str]:
        return self._entries(folder, lambda entry: entry.is_dir())

    def files(self, folder: str = "") -> list[tuple[str, int, float]]:
        paths = sorted(path for path in (self._root / folder).rglob("*") if path.is_file() and not path.is_symlink())
        states = [(path.relative_to(self._root).as_posix(), path.stat()) for path in paths]
        return [(key, state.st_size, state.st_mtime) for key, state in states]

    def remove(self, key: str) -> None:
        path = self._root / key
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_directory(path.parent)

    @contextlib.contextmanager
    def workshop(self, key: str) -> Iterator[Path]:
        folder = self._root / key
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def publish(self, workshop: Path, key: str, outputs: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
        if workshop.is_dir():
            for folder in (workshop, *(path for path in workshop.rglob("*") if path.is_dir())):
                sync_directory(folder)
            sync_directory(workshop.parent)
        return tuple(outputs)

    def put_folder(self, key: str, write: WriteLocally, *, last: str) -> tuple[OutputFile, ...]:
        path = self._root / key
        create_directory(path.parent)
        with atomic_path(path) as written:
            write(written)
            return describe_files(written)  # before it is in place, where the next writer may replace it at once

    def local(self, key: str, outputs: Sequence[OutputFile], scratch: Path) -> Path:
        root = self._root.resolve()
        for output in outputs:
            path = self._root / key / output.path
            if not path.is_file():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            if not path.resolve().is_relative_to(root):
                raise ValueError(f"{path} is a link out of {self._root}")
        return self._root / key

    def copied(self, scratch: Path) -> Path:
        return self._root

    def _entries(self, folder: str, wanted: Callable[[Path], bool]) -> list[str]:
        try:  # asking first would miss one that another process takes away now
            entries = list((self._root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e.name for e in entries if not _is_partial(e.name) and wanted(e))


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL_SUFFIX)
