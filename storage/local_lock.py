"""The lock of a run in a folder: ``flock`` on a file that holds the driver's name.

The kernel frees the lock when the process ends, however it ends; a forked child does not keep it. It holds among the
processes of one host, and on shared file systems that carry flock to their server (NFS since Linux 2.6.12 unless mounted
with ``local_lock``).
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from storage.run_store import Driver, RunLocked

_held_locks: set[int] = set()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, which is made if it is missing.

    Raises:
        RunLocked: names the process that holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(
                f"{path.parent} is in use by {_describe_holder(descriptor)}: wait for it, stop it, or use another "
                "run directory (the lock frees itself when that process ends)"
            ) from None
        _held_locks.add(descriptor)
        try:
            _write_holder(descriptor)
            yield
        finally:
            _held_locks.discard(descriptor)
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def lock_holder(path: Path) -> Driver:
    """Who holds the lock file now, or held it and was killed.

    A driver that ends leaves the file empty, so the lock itself is tried (shared, for an instant) only where a name is
    left in it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return Driver(None, None)
    try:
        if not (text := os.pread(descriptor, 4096, 0)):
            return Driver(None, None)
        try:
            name = json.loads(text)
            who = f"process {name['pid']} on host {name['host']}, since {name['started']}"
        except (ValueError, KeyError, TypeError):
            who = "a process that has not written its name"
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


def _write_holder(descriptor: int) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _describe_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on host {holder['host']} (since {holder['started']})"
    except (ValueError, KeyError, TypeError):
        return "another process that has not yet written its name"
