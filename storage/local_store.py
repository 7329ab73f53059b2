"""A run in a folder, on a local disk or a shared file system."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

from storage.atomic_files import (
    PARTIAL_SUFFIX,
    atomic_path,
    create_directory,
    explain_write_failure,
    partial_path,
    sha256_file,
    sweep_partial_files,
    sync_directory,
    sync_file,
    write_bytes_atomic,
)
from storage.local_lock import lock_holder, locked
from storage.output_file import OutputFile
from storage.run_store import Driver, LineLog, RunStore, StoredFile, WriteLocally

LOCK_FILE = "run.lock"

_HASHED = 4
"""Files of a folder that are hashed at a time, from the page cache: a core each."""

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)


class LocalStore:
    """See :class:`storage.run_store.RunStore`."""

    epoch = 0
    num_requests = 1

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

    def stat(self, key: str) -> StoredFile:
        path = self._root / key
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if not path.resolve().is_relative_to(self._root.resolve()):
            raise ValueError("a link out of the run directory")
        found = path.stat()
        identity = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
        return StoredFile(found.st_size, identity, mtime_ns=found.st_mtime_ns)

    def listed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def checksum(self, key: str) -> str:
        return sha256_file(self._root / key)

    def put(self, key: str, data: bytes, *, exclusive: bool = False) -> OutputFile:
        path = self._root / key
        create_directory(path.parent)
        write_bytes_atomic(path, data, exclusive=exclusive)
        return OutputFile(key, len(data), hashlib.sha256(data).hexdigest())

    def put_record(self, key: str, data: bytes, *, is_newer: Callable[[bytes], bool]) -> None:
        self.put(key, data)

    def publish(
        self, key: str, write: WriteLocally, *, last: str | None = None, num_bytes: int | None = None
    ) -> tuple[OutputFile, ...]:
        path = self._root / key
        with explain_write_failure(path, num_bytes):
            create_directory(path.parent)
            with atomic_path(path) as written:
                write(written)
                files = sorted(f for f in written.rglob("*") if f.is_file()) if written.is_dir() else [written]
                # Before it is in place, where the next writer may replace it at once.
                with ThreadPoolExecutor(_HASHED, thread_name_prefix="sha256") as pool:
                    found = list(pool.map(lambda file: OutputFile.describe(file, run=written.parent), files))
        return tuple(replace(output, path=str(PurePosixPath(key).parent / output.path)) for output in found)

    def adopt(self, outputs: Sequence[OutputFile], source: RunStore) -> tuple[OutputFile, ...]:
        assert isinstance(source, LocalStore)
        for output in outputs:
            self._adopt(output, source._root / output.path)
        for directory in {(self._root / output.path).parent for output in outputs}:
            sync_directory(directory)
        return tuple(outputs)

    def _adopt(self, output: OutputFile, original: Path) -> None:
        """A link needs no check: it is the file that was looked at."""
        target = self._root / output.path
        create_directory(target.parent)
        if target.exists() and target.samefile(original):
            return
        partial = partial_path(target)
        try:
            if not _link(original, partial):
                shutil.copyfile(original, partial)
                sync_file(partial)
                if sha256_file(partial) != output.checksum:
                    raise ValueError(f"{output.path}: SHA-256 of {original} differs from the record")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def local_files(self, keys: Sequence[str]) -> Iterator[list[Path]]:
        yield [self._existing(key) for key in keys]

    def local_folder(self, key: str) -> Path:
        return self._existing(key)

    def _existing(self, key: str) -> Path:
        path = self._root / key
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return path

    def names(self, folder: str) -> list[str]:
        return self._entries(folder, lambda entry: entry.is_file())

    def subfolders(self, folder: str) -> list[str]:
        return self._entries(folder, lambda entry: entry.is_dir())

    def _entries(self, folder: str, wanted: Callable[[Path], bool]) -> list[str]:
        try:  # asking first would miss one that another process takes away now
            entries = list((self._root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e.name for e in entries if not _is_partial(e.name) and wanted(e))

    def remove(self, key: str) -> None:
        path = self._root / key
        if path.exists():
            path.unlink(missing_ok=True)
            sync_directory(path.parent)

    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._root.rglob("*") if path.is_file())

    def sweep(self) -> tuple[str, ...]:
        return sweep_partial_files(self._root)

    def check_key(self, folder: str, name: str) -> None:
        found = (self._root / folder / name).resolve()
        if found != (self._root / folder).resolve() / name:
            raise ValueError(f"array name {name!r} leads through a symbolic link to {found}: remove the link")

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return locked(self._root / LOCK_FILE)

    def driver(self) -> Driver:
        return lock_holder(self._root / LOCK_FILE)

    def open_log(self, folder: str, name: str) -> LineLog:
        (self._root / folder).mkdir(parents=True, exist_ok=True)
        return _FileLog(self._root / folder / name)

    def read_log(self, folder: str, name: str) -> Iterator[str]:
        path = self._root / folder / name
        if path.is_file():
            yield from path.read_text(encoding="utf-8").splitlines()


def _link(original: Path, target: Path) -> bool:
    """Whether there can be hard links between the two."""
    try:
        os.link(original, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


class _FileLog:
    """Every line is written at once, so that the log tells the truth after a kill."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end_torn_line()

    def append(self, line: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, writing the event log", str(self._path)) from error

    def close(self) -> None:
        """Nothing is left to do."""

    def _end_torn_line(self) -> None:
        """A line cut short by a kill or a full disk must not take the next one with it."""
        if self._path.is_file() and self._path.stat().st_size > 0:
            with self._path.open("rb+") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL_SUFFIX)
