"""The directory of one run, a folder or a prefix of a bucket: its configuration, where its parts lie, and who may drive it.

::

    config.json      format version, resolved configuration, provenance
    run.lock         who drives the run: a flock in a folder, a lease in a bucket
    manifest/        storage.manifest
    hashed.jsonl     storage.hashed_files
    calibration.zarr storage.calibration_store
    blocks/          block artifacts, a folder a method
    checkpoint/      the result (checkpoints/<method>/ when methods are compared)
    evaluation/  logs/  report.html
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from storage.atomic_files import json_bytes
from storage.calibration_store import CalibrationStore
from storage.local_store import LOCK_FILE
from storage.location import Location, StoreUrl, local_path, parse_location
from storage.manifest import Manifest
from storage.open_store import open_store
from storage.run_store import RunLocked as RunLocked
from storage.run_store import RunStore

FORMAT_VERSION = 1
"""Version of the run directory as a whole."""

REPORT = "report.html"
LOGS = "logs"
EVALUATION = "evaluation"

_CONFIG_FILE = "config.json"
_METHOD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}")


class RunConfigMismatch(ValueError):
    """The run directory belongs to a different configuration."""


class RunFormatTooNew(ValueError):
    """The run directory was written by a newer program."""


class RunDirectory:
    """An existing run directory; get one from :meth:`open` or :meth:`open_or_create`.

    Where it is a folder it is a path-like object: ``Path(run)`` and ``Manifest(run)`` work.
    """

    def __init__(self, location: str | os.PathLike[str] | StoreUrl) -> None:
        self.location = _absolute(location)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """The folder. Raises ValueError where the run is in a bucket."""
        return local_path(self.location, why="has no local directory")

    @property
    def store(self) -> RunStore:
        """The operations on its files."""
        return open_store(self.location)

    @classmethod
    def open(cls, location: "str | os.PathLike[str] | StoreUrl") -> "RunDirectory":
        """An existing run, as it is.

        Raises:
            ValueError: no run there, or an unreadable ``config.json``.
            RunFormatTooNew: written by a newer program.
        """
        run = cls(location)
        if not run._has_config():
            raise ValueError(f"{run.location} is not a run directory: it has no {_CONFIG_FILE}")
        run._read_config_file()
        return run

    @classmethod
    def open_or_create(
        cls,
        location: "str | os.PathLike[str] | StoreUrl",
        config: dict[str, Any],
        provenance: dict[str, Any],
        *,
        update: bool = False,
    ) -> "RunDirectory":
        """The run at ``location``: a new one, or the existing one of the same configuration.

        Args:
            location: local, on a shared file system (made absolute), or ``s3://bucket/prefix``.
            config: the resolved configuration, JSON.
            provenance: versions, commit and the like, JSON; kept from the creation or the last update, not compared.
            update: let a different ``config`` replace the stored one (under the run's lock).

        Raises:
            RunConfigMismatch: the stored configuration differs; lists every differing key.
            RunFormatTooNew: written by a newer program.
            RunLocked: ``update`` while a driver is at work.
            ValueError: a URL of another kind, somebody else's folder, or an unreadable ``config.json``.
        """
        run = cls(location)
        document = {"format_version": FORMAT_VERSION, "config": config, "provenance": provenance}
        document = json.loads(json.dumps(document, allow_nan=False))
        if not run._has_config():
            run._refuse_foreign_folder()
            with contextlib.suppress(FileExistsError):  # another driver was faster: compare with its file
                run.store.put(_CONFIG_FILE, json_bytes(document), exclusive=True)
        if run._differences(document["config"], update=update):
            with run.lock():
                run.store.put(_CONFIG_FILE, json_bytes(document))
        return run

    @classmethod
    def check(
        cls, location: "str | os.PathLike[str] | StoreUrl", config: dict[str, Any], *, update: bool = False
    ) -> None:
        """Raise what :meth:`open_or_create` would raise now, but for locks; writes nothing."""
        run = cls(location)
        if run._has_config():
            run._differences(json.loads(json.dumps(config, allow_nan=False)), update=update)
        else:
            run._refuse_foreign_folder()

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
        return CalibrationStore(self.location / "calibration.zarr")

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.location)

    @staticmethod
    def checkpoint_key(method: str | None = None) -> str:
        """The resulting pipeline folder, relative to the run: of the run, or of one of the methods that it compares."""
        return "checkpoint" if method is None else f"checkpoints/{_checked_method(method)}"

    @staticmethod
    def blocks_key(method: str) -> str:
        """Folder of a method's block artifacts, relative to the run."""
        return f"blocks/{_checked_method(method)}"

    def checkpoint(self, method: str | None = None) -> Path:
        """The folder of :meth:`checkpoint_key`; as all paths of a run, a ValueError where it is in a bucket."""
        return self.path / self.checkpoint_key(method)

    def blocks(self, method: str) -> Path:
        """The folder of :meth:`blocks_key`."""
        return self.path / self.blocks_key(method)

    @property
    def evaluation(self) -> Path:
        return self.path / EVALUATION

    @property
    def logs(self) -> Path:
        return self.path / LOGS

    @property
    def report(self) -> Path:
        return self.path / REPORT

    def sweep_partial_files(self) -> tuple[str, ...]:
        """Remove what killed writers left anywhere in the run, while holding :meth:`lock`; returns the paths."""
        return self.store.sweep()

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Be the only driver of this run: ``storage.local_lock`` in a folder, ``storage.s3_lease`` in a bucket.

        Raises:
            RunLocked: names the process that holds it.
        """
        return self.store.lock()

    def _has_config(self) -> bool:
        return _CONFIG_FILE in self.store.names("")

    def _differences(self, config: dict[str, Any], *, update: bool) -> list[str]:
        differences = _differences(self.config, config)
        if differences and not update:
            raise RunConfigMismatch(
                f"{self.location} was made with another configuration:\n  "
                + "\n  ".join(differences)
                + "\n--update takes the new one and redoes only what depends on these keys; "
                "or give another run directory; or set the keys back"
            )
        return differences

    def _read_config_file(self) -> dict[str, Any]:
        path = self.location / _CONFIG_FILE
        try:
            document = json.loads(self.store.read(_CONFIG_FILE))
            version = int(document["format_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not readable ({error!r}): restore it, or use another run directory") from error
        if version > FORMAT_VERSION:
            raise RunFormatTooNew(
                f"{self.location} has format {version}, this program knows up to {FORMAT_VERSION}: use the newer program, "
                "or another run directory"
            )
        if not isinstance(document.get("config"), dict) or not isinstance(document.get("provenance"), dict):
            raise ValueError(f"{path} lacks config or provenance: restore it, or use another run directory")
        return dict(document)

    def _refuse_foreign_folder(self) -> None:
        if isinstance(self.location, Path) and self.location.is_file():
            raise ValueError(f"{self.location} is a file: give a directory for the run")
        entries = {*self.store.names(""), *self.store.subfolders("")}
        foreign = sorted(entries - {LOCK_FILE, _CONFIG_FILE})
        if foreign:
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise ValueError(
                f"{self.location} is not empty and not a run (holds {shown}): give a new or empty directory"
            )


def _absolute(location: str | os.PathLike[str] | StoreUrl) -> Location:
    return parse_location(location).absolute()


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
