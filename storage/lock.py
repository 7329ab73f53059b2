"""Who drives a run: a ``flock`` in a folder, a courtesy in a bucket.

A folder's lock is freed by the kernel when the process ends, however it ends; a forked child does not keep it. It holds among
the processes of one host, and on shared file systems that carry flock to their server (NFS since Linux 2.6.12 unless mounted
with ``local_lock``). It refuses a second driver.

A bucket's is an object that names the driver and is removed at its end. It keeps nobody out: a second driver is told of the
first, and both may go on, as neither harms what the other has recorded (:mod:`storage.cache`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from storage.atomic_files import create_directory
from storage.location import Location
from storage.open_place import open_place

LOCK_FILE = "run.lock"
"""Directly in the directory of a run or a study."""
USERS_FILE = "users.lock"
"""Directly in a folder's cache: its drivers hold it together."""

_BOTH = "both drivers may go on, which does some work twice and no harm"

_logger = logging.getLogger(__name__)
_held_locks: set[int] = set()


class RunLocked(ValueError):
    """Another driver works on this run."""


@dataclass(frozen=True)
class Driver:
    """Who drives a run, as far as can be seen from outside."""

    at_work: str | None
    """Names the driver that holds the run. In a bucket it may have been killed on another machine."""
    died: str | None
    """Names a driver that ended without giving the run back."""


@contextlib.contextmanager
def driving(location: Location) -> Iterator[None]:
    """Be the driver of the run or study at a location.

    Raises:
        RunLocked: in a folder, naming the process that holds it.
    """
    with _locked(location / LOCK_FILE) if isinstance(location, Path) else _announced(location):
        yield


@contextlib.contextmanager
def using(cache: Location, alone: Callable[[], object]) -> Iterator[None]:
    """Use a cache, beside other drivers perhaps; in a folder ``alone`` is called first if there are none."""
    if not isinstance(cache, Path):
        yield
        return
    create_directory(cache)
    descriptor = os.open(cache / USERS_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone()
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _held_locks.add(descriptor)
        yield
    finally:
        _held_locks.discard(descriptor)
        os.close(descriptor)


def driver_of(location: Location) -> Driver:
    """Who drives the run at a location now, or drove it and was killed; changes nothing."""
    return _holder(location / LOCK_FILE) if isinstance(location, Path) else _announced_at(location)


@contextlib.contextmanager
def _announced(location: Location) -> Iterator[None]:
    place, mine = open_place(location), _my_name()
    try:
        place.put(LOCK_FILE, mine, exclusive=True)
    except FileExistsError:
        if (other := driver_of(location).at_work) is not None:
            _logger.warning("%s is in use by %s, or was when that was killed: %s", location, other, _BOTH)
        place.put(LOCK_FILE, mine)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the courtesy of an end that has another reason
            if place.read(LOCK_FILE) == mine:
                place.remove(LOCK_FILE)


def _announced_at(location: Location) -> Driver:
    try:
        raw = open_place(location).read(LOCK_FILE)
    except FileNotFoundError:
        return Driver(None, None)
    name = _parsed(raw)
    gone = name is not None and name["host"] == socket.gethostname() and not Path(f"/proc/{name['pid']}").exists()
    return Driver(None, _words(name)) if gone else Driver(_words(name), None)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _words(_parsed(os.pread(descriptor, 4096, 0)))
            raise RunLocked(
                f"{path.parent} is in use by {holder}: wait for it, stop it, or use another run directory (the lock frees "
                "itself when that process ends)"
            ) from None
        _held_locks.add(descriptor)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _my_name(), 0)
            yield
        finally:
            _held_locks.discard(descriptor)
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _holder(path: Path) -> Driver:
    """A driver that ends leaves the file empty, so the lock itself is tried (shared, for an instant) only where a name is left
    in it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return Driver(None, None)
    try:
        if not (text := os.pread(descriptor, 4096, 0)):
            return Driver(None, None)
        who = _words(_parsed(text))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Driver(who, None)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return Driver(None, who)
    finally:
        os.close(descriptor)


def _close_held_locks() -> None:
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


# A forked child shares the open file and with it the lock, which would outlive the driver.
os.register_at_fork(after_in_child=_close_held_locks)


def _my_name() -> bytes:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}).encode() + b"\n"


def _parsed(text: bytes) -> dict[str, object] | None:
    try:
        name = json.loads(text)
        return {key: name[key] for key in ("host", "pid", "started")}
    except (ValueError, KeyError, TypeError):
        return None


def _words(name: dict[str, object] | None) -> str:
    if name is None:
        return "a process that has not written its name"
    return f"process {name['pid']} on host {name['host']}, since {name['started']}"
