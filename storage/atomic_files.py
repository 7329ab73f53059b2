"""Files that are whole or absent, whatever is killed on the way.

Everything is written beside its target under a hidden ``.<name>.<random>.partial`` name, synced, and renamed; then the
directory is synced. A kill leaves the old state, or the new one, and at most one partial file, which
:func:`sweep_partial_files` removes. Only the holder of the run's lock may sweep: a partial file may be somebody's work.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".partial"
"""Ends the name of everything that is not finished."""
_ATTEMPTS = 100
"""So often other writers may put theirs in place in between."""


def partial_path(target: Path) -> Path:
    """A fresh hidden name in the directory of ``target``, so that a rename to ``target`` is atomic."""
    return target.parent / f".{target.name}.{secrets.token_hex(6)}{PARTIAL_SUFFIX}"


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A path of ``target``'s name in a fresh hidden folder beside it, for the body to make a file or a folder at.

    Synced with all that is in it, it then replaces ``target``, or goes if the body raises. Whoever writes, and however many
    at once: ``target`` is always a whole one.

    Raises:
        OSError: it cannot be put in place.
    """
    own = partial_path(target)
    written = own / target.name
    own.mkdir()
    try:
        yield written
        for path in (written, *written.rglob("*")):
            sync_file(path)
        _put_in_place(written, target, aside=own / f"old{PARTIAL_SUFFIX}")
        sync_directory(target.parent)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _put_in_place(written: Path, target: Path, *, aside: Path) -> None:
    """A folder is not renamed over one with files in it: an older one is moved aside first."""
    for _ in range(_ATTEMPTS):
        try:
            written.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        remove_folder(aside)
        with contextlib.suppress(FileNotFoundError):
            target.rename(aside)
    raise OSError(errno.EBUSY, "other writers keep replacing it", str(target))


def write_bytes_atomic(path: Path, data: bytes, *, exclusive: bool = False) -> None:
    """Write ``data`` durably: after the return it survives a power loss, before it nothing is to be seen at ``path``.

    The parent directory must exist (:func:`create_directory`).

    Args:
        path: target file; replaced if it exists, unless ``exclusive``.
        data: the whole content.
        exclusive: raise ``FileExistsError`` instead of replacing (hard link: atomic among processes).

    Raises:
        OSError: disk full, no permission...: names path, bytes to write and bytes free; nothing is left behind.
    """
    partial = partial_path(path)
    try:
        with explain_write_failure(path, len(data)):
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if exclusive:
                os.link(partial, path)
            else:
                os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def json_bytes(value: Any) -> bytes:
    """``value`` as JSON with sorted keys: equal values give equal bytes.

    Raises:
        ValueError: ``value`` holds NaN or infinity, which JSON does not know.
        TypeError: ``value`` holds something that is not JSON.
    """
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of ``path``, a file or a folder, durable, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_directory(path: Path) -> None:
    """Create ``path`` and its missing parents durably; existing ones are fine."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it, which another process may be removing too; fine if there is none."""
    while path.exists():
        # Of a file that the other one was faster with: go on with the rest.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


def sweep_partial_files(root: Path) -> tuple[str, ...]:
    """Remove what killed writers left under ``root``; call it only while holding the run's lock.

    Returns:
        The removed paths, relative to ``root``, sorted. Symbolic links are not followed.
    """
    removed = []
    for directory, folders, files in os.walk(root):
        for name in [entry for entry in folders + files if entry.startswith(".") and entry.endswith(PARTIAL_SUFFIX)]:
            path = Path(directory, name)
            if path.is_dir() and not path.is_symlink():
                folders.remove(name)
                # Of a writer that was given up and lives: it must not put in place what is half removed.
                aside = path.with_name(f".{secrets.token_hex(6)}{PARTIAL_SUFFIX}")
                try:
                    path.rename(aside)
                except FileNotFoundError:
                    continue
                remove_folder(aside)
            else:
                path.unlink(missing_ok=True)
            removed.append(path.relative_to(root).as_posix())
    return tuple(sorted(removed))


@contextlib.contextmanager
def explain_write_failure(path: Path, num_bytes: int | None) -> Iterator[None]:
    """Turn an ``OSError`` of the body into one that names ``path``, the bytes to write and the bytes free.

    ``FileExistsError`` passes unchanged: it is an answer, not a failure. So does every error if nobody knows the bytes (None).
    """
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        if num_bytes is None:
            raise
        reason = error.strerror or str(error)
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = f"; {_free_bytes(path)} bytes are free there: free space, raise the quota or use another disk"
        raise OSError(error.errno, f"{reason}, writing {num_bytes} bytes{hint}", str(path)) from error


def _free_bytes(path: Path) -> int:
    existing = next(parent for parent in path.parents if parent.is_dir())
    return shutil.disk_usage(existing).free
