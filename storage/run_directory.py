"""The directory of one run: its configuration, where its parts lie, and who may drive it.

::

    config.json      format version, resolved configuration, provenance
    run.lock         flock of the driver at work, with its name
    manifest/        storage.manifest
    calibration.zarr storage.calibration_store
    blocks/          block artifacts, a folder a method
    checkpoint/      the result (checkpoints/<method>/ when methods are compared)
    evaluation/  logs/  report.html
"""

import contextlib
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.atomic_files import PARTIAL_SUFFIX, create_directory, sweep_partial_files, write_json_atomic
from storage.calibration_store import CalibrationStore
from storage.manifest import Manifest

FORMAT_VERSION = 1
"""Version of the run directory as a whole."""

_CONFIG_FILE = "config.json"
_LOCK_FILE = "run.lock"
_METHOD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}")
_held_locks: set[int] = set()


class RunConfigMismatch(ValueError):
    """The run directory belongs to a different configuration."""


class RunFormatTooNew(ValueError):
    """The run directory was written by a newer program."""


class RunLocked(ValueError):
    """Another driver works on this run."""


class RunDirectory:
    """An existing run directory; get one from :meth:`open` or :meth:`open_or_create`.

    It is a path-like object: ``Path(run)`` and ``Manifest(run)`` work.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "RunDirectory":
        """An existing run, as it is.

        Raises:
            ValueError: no run there, or an unreadable ``config.json``.
            RunFormatTooNew: written by a newer program.
        """
        run = cls(_local_path(path))
        if not (run.path / _CONFIG_FILE).is_file():
            raise ValueError(f"{run.path} is not a run directory: it has no {_CONFIG_FILE}")
        run._read_config_file()
        return run

    @classmethod
    def open_or_create(
        cls,
        path: str | os.PathLike[str],
        config: dict[str, Any],
        provenance: dict[str, Any],
        *,
        update: bool = False,
    ) -> "RunDirectory":
        """The run at ``path``: a new one, or the existing one of the same configuration.

        Args:
            path: local or on a shared file system; made absolute.
            config: the resolved configuration, JSON.
            provenance: versions, commit and the like, JSON; kept from the creation or the last update, not compared.
            update: let a different ``config`` replace the stored one (under the run's lock).

        Raises:
            RunConfigMismatch: the stored configuration differs; lists every differing key.
            RunFormatTooNew: written by a newer program.
            RunLocked: ``update`` while a driver is at work.
            ValueError: a URL, somebody else's folder, or an unreadable ``config.json``.
        """
        run = cls(_local_path(path))
        document = {"format_version": FORMAT_VERSION, "config": config, "provenance": provenance}
        document = json.loads(json.dumps(document, allow_nan=False))
        config_file = run.path / _CONFIG_FILE
        if not config_file.exists():
            run._refuse_foreign_folder()
            create_directory(run.path)
            with contextlib.suppress(FileExistsError):  # another driver was faster: compare with its file
                write_json_atomic(config_file, document, exclusive=True)
        differences = _differences(run.config, document["config"])
        if differences and not update:
            raise RunConfigMismatch(
                f"{run.path} was made with another configuration:\n  "
                + "\n  ".join(differences)
                + "\n--update takes the new one and redoes only what depends on these keys; "
                "or give another run directory; or set the keys back"
            )
        if differences:
            with run.lock():
                write_json_atomic(config_file, document)
        return run

    @property
    def config(self) -> dict[str, Any]:
        """The stored resolved configuration."""
        config: dict[str, Any] = self._read_config_file()["config"]
        return config

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, commit and the like, of the creation or the last update."""
        provenance: dict[str, Any] = self._read_config_file()["provenance"]
        return provenance

    @property
    def calibration_store(self) -> CalibrationStore:
        return CalibrationStore(self.path / "calibration.zarr")

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.path)

    def checkpoint(self, method: str | None = None) -> Path:
        """The resulting pipeline folder: of the run, or of one of the methods that it compares."""
        return self.path / "checkpoint" if method is None else self.path / "checkpoints" / _checked_method(method)

    def blocks(self, method: str) -> Path:
        """Folder of a method's block artifacts."""
        return self.path / "blocks" / _checked_method(method)

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def sweep_partial_files(self) -> tuple[str, ...]:
        """Remove what killed writers left anywhere in the run, while holding :meth:`lock`; returns the paths."""
        return sweep_partial_files(self.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only driver of this run.

        The kernel frees the lock when the process ends, however it ends; a forked child does not keep it. It holds
        among the processes of one host, and on shared file systems that carry flock to their server (NFS since
        Linux 2.6.12 unless mounted with ``local_lock``).

        Raises:
            RunLocked: names the process that holds it.
        """
        path = self.path / _LOCK_FILE
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunLocked(
                    f"{self.path} is in use by {_describe_holder(descriptor)}: wait for it, stop it, or use another "
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

    def _read_config_file(self) -> dict[str, Any]:
        path = self.path / _CONFIG_FILE
        try:
            document = json.loads(path.read_bytes())
            version = int(document["format_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not readable ({error!r}): restore it, or use another run directory") from error
        if version > FORMAT_VERSION:
            raise RunFormatTooNew(
                f"{self.path} has format {version}, this program knows up to {FORMAT_VERSION}: use the newer program, "
                "or another run directory"
            )
        if not isinstance(document.get("config"), dict) or not isinstance(document.get("provenance"), dict):
            raise ValueError(f"{path} lacks config or provenance: restore it, or use another run directory")
        return dict(document)

    def _refuse_foreign_folder(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: give a directory for the run")
        ours = (_LOCK_FILE, _CONFIG_FILE)
        foreign = sorted(e.name for e in self.path.iterdir() if e.name not in ours and e.suffix != PARTIAL_SUFFIX)
        if foreign:
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise ValueError(f"{self.path} is not empty and not a run (holds {shown}): give a new or empty directory")


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


def _local_path(path: str | os.PathLike[str]) -> Path:
    if "://" in str(path):
        raise ValueError(f"run directory {path} is a URL: give a local path or one on a mounted shared file system")
    return Path(path).absolute()


def _checked_method(method: str) -> str:
    if not _METHOD.fullmatch(method):
        raise ValueError(
            f"method name {method!r} must be 1-200 letters, digits or . _ = + -, beginning with a letter or digit"
        )
    return method


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per differing key, dotted: ``key: old -> new``."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    lines = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        was, now = flat_old.get(key, "absent"), flat_new.get(key, "absent")
        if was != now:
            lines.append(f"{key}: {was} -> {now}")
    return lines


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, sort_keys=True)
    return flat
