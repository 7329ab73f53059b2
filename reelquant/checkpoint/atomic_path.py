"""Files and folders that are whole or absent, whoever writes them, however many at once, and whatever is killed on the way.

    .<name>.<random>.partial/     an attempt's own folder, beside <name>
        new                       what is written; it is renamed to <name> when it is on the disk
        old                       what stood there before

A killed attempt leaves its folder: the next one removes it when it is a day old, a run's driver when it starts. Both rename it
first: a writer that lives after all has nothing to put in place then.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

_ABANDONED_S = 86_400
_ATTEMPTS = 100
"""So often other writers may put theirs in place in between."""


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A fresh path for the body to write a file or a folder at; it then replaces `target`, or goes if the body raises.

    Raises:
        OSError: it cannot be put in its place.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 12}.partial"):
        _remove_if_abandoned(left, aside=_own_name(target))
    own = _own_name(target)
    own.mkdir()
    try:
        yield own / "new"
        for path in [own / "new", *(own / "new").rglob("*")]:
            _sync(path)
        _put_in_place(own / "new", target, own / "old")
        _sync(target.parent)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _own_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")


def _remove_if_abandoned(folder: Path, *, aside: Path) -> None:
    with contextlib.suppress(OSError):  # another user's, or somebody else removes it
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _ABANDONED_S:
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(written: Path, target: Path, old: Path) -> None:
    for _ in range(_ATTEMPTS):
        try:
            written.replace(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            target.rename(old)
    raise OSError(errno.EBUSY, "other writers keep replacing it", str(target))
