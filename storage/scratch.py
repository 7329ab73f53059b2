"""Local room for what a store in a bucket cannot do in place: files before they are uploaded, and copies to read.

One folder a process, below ``TMPDIR``, removed when the process ends. What a killed process leaves is removed by the next one
that needs room: a folder whose lock nobody holds belongs to nobody.
"""

import atexit
import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_PREFIX = "reelquant-scratch-"
_LOCK_FILE = ".lock"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new, empty folder for the body's time."""
    folder = Path(tempfile.mkdtemp(dir=scratch_root()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_root() -> Path:
    """The folder of this process."""
    return _root_of(os.getpid())


@contextlib.contextmanager
def locked_folder(base: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `base` for the body's time; those of the prefix that killed processes have left are removed."""
    folder, descriptor = _new_locked(base, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@lru_cache(maxsize=1)
def _root_of(process: int) -> Path:
    folder, _ = _new_locked(Path(tempfile.gettempdir()), _PREFIX)
    atexit.register(_remove_own, folder, process)
    return folder


def _new_locked(base: Path, prefix: str) -> tuple[Path, int]:
    """The folder, and the descriptor that holds its lock until it is closed or the process ends."""
    for left in base.glob(f"{glob.escape(prefix)}*"):
        _remove_if_dead(left)
    # Under its final name only once it is locked: nobody can take it for a dead one.
    new = Path(tempfile.mkdtemp(prefix=".reelquant-", dir=base))
    descriptor = os.open(new / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    folder = base / f"{prefix}{new.name.removeprefix('.reelquant-')}"
    new.rename(folder)
    return folder, descriptor


def _remove_own(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_dead(folder: Path) -> None:
    try:
        descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or another user's
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
