"""The private directory of one local Ray session: token, sockets, logs, spilled objects.

```
<base>/rq-<random>/               0700, removed at the end of the session
    owner.lock                    held with flock by the driver for as long as it lives
    auth_token                    0600
    ray/                          Ray's own, which it makes 0777
        session_<date>_<pid>/     sockets/ and logs/
        spill/                    objects that did not fit the object store
```
A driver killed with SIGKILL leaves its directory behind; the next session finds it without an owner and removes it.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_logger = logging.getLogger(__name__)

DIRECTORY_PREFIX = "rq-"
_LOCK_NAME = "owner.lock"

# A Unix socket path holds 107 bytes; so much of it is below the base.
_LONGEST_BASE = 107 - len("/rq-12345678/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")


def default_base() -> Path:
    """`$RAY_TMPDIR` when set, otherwise the system's temporary directory, or `/tmp` where that path is too long."""
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    return base if len(os.fsencode(base)) <= _LONGEST_BASE else Path("/tmp")


@contextlib.contextmanager
def session_directory(base: Path) -> Iterator[Path]:
    """Make the directory of one session below `base`; remove it, and ones without a living owner, when done.

    Raises ValueError when the path of `base` is too long for the Unix sockets that Ray puts below it.
    """
    base = base.expanduser().resolve()
    if len(os.fsencode(base)) > _LONGEST_BASE:
        raise ValueError(
            f"the session's base directory {base} has {len(os.fsencode(base))} bytes in its path: Unix sockets below it "
            f"allow {_LONGEST_BASE}; pass a shorter base_directory, or set RAY_TMPDIR to one"
        )
    base.mkdir(parents=True, exist_ok=True)
    sweep_ownerless(base)
    directory = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=base))
    lock = _take_ownership(directory)
    try:
        (directory / "ray" / "spill").mkdir(parents=True)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def write_token(directory: Path) -> Path:
    """Write a fresh 256-bit token to `directory/auth_token`, readable by this user alone, and return its path."""
    path = directory / "auth_token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


def restrict_token(path: Path) -> None:
    """Take from group and others every right to a token file; Ray itself writes it 0644."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        path.chmod(0o600)
        _logger.warning("the token file %s had mode %o: it is 600 now", path, mode)


def sweep_ownerless(base: Path) -> list[Path]:
    """Remove session directories below `base` whose driver is gone; return their paths."""
    removed = []
    for lock_path in sorted(base.glob(f"{DIRECTORY_PREFIX}*/{_LOCK_NAME}")):
        try:
            descriptor = os.open(lock_path, os.O_RDONLY)
        except (FileNotFoundError, PermissionError):
            continue  # its owner has just removed it, or it is another user's
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(lock_path.parent, ignore_errors=True)
            removed.append(lock_path.parent)
        finally:
            os.close(descriptor)
    return removed


def _take_ownership(directory: Path) -> int:
    """Lock first, name second: a lock file that a sweep can see is always held by a living owner."""
    unnamed = directory / "owner.new"
    descriptor = os.open(unnamed, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(unnamed, directory / _LOCK_NAME)
    return descriptor
