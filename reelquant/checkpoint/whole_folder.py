"""A folder that is whole or absent, whoever writes it, however many at once, and whatever is killed on the way.

    .<name>.<random>.partial/     a writer's own, beside <name>
        lock                      on which the writer holds a flock as long as it lives; made first, removed last
        new/                      what is written; it is renamed to <name> when it is on the disk
        old/                      what stood there before

Where nobody holds the lock the writer was killed, and the next one of the same name removes what it left. It renames it first:
a writer that lives after all, on a shared file system that does not carry locks, then has nothing to put in its place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_LOCK = "lock"
_ATTEMPTS = 100
"""So often other writers may put their folder in its place in between."""


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write into for the body's time; then it replaces `target`, or goes if the body raises.

    Raises:
        OSError: the folder cannot be made, or not be put in its place.
    """
    for left in target.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.partial", left.name):
            _remove_if_dead(left, aside=_fresh_name(target))
    own, lock = _new_folder(target)
    try:
        written = own / "new"
        written.mkdir()
        yield written
        for folder in [path for path in written.rglob("*") if path.is_dir()] + [written]:
            sync_folder(folder)
        _put_in_place(written, target, own / "old")
    finally:
        _remove(own)
        os.close(lock)


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fresh_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")


def _new_folder(target: Path) -> tuple[Path, int]:
    """A folder and its lock's descriptor; another one where somebody took it for a dead writer's before it was locked."""
    while True:
        own = _fresh_name(target)
        own.mkdir()
        try:
            lock = os.open(own / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError as error:
            # Where there are no locks, nobody finds out that this writer is dead, and what it leaves stays.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(lock)
                raise
        if (own / _LOCK).exists():
            return own, lock
        os.close(lock)


def _remove_if_dead(folder: Path, *, aside: Path) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # not yet, or no longer: it is empty then
        with contextlib.suppress(OSError):
            folder.rmdir()
        return
    except OSError:  # another user's
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.rename(aside)
        _remove(aside)
    except OSError:  # its writer lives, or somebody else removes it
        return
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """The lock last: whatever a kill leaves of it can be told from a living writer's."""
    for name in ("new", "old"):
        shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / _LOCK).unlink()
        folder.rmdir()


def _put_in_place(written: Path, target: Path, old: Path) -> None:
    for _ in range(_ATTEMPTS):
        try:
            written.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            sync_folder(target.parent)
            return
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            target.rename(old)
    raise OSError(errno.EBUSY, "other writers keep replacing it", str(target))
