"""The directory of one run, a folder or a prefix of a bucket: its configuration, its units, and where its parts lie.

::

    config.json      format version, resolved configuration, prompts, provenance, where the cache is
    units.json       what the driver knows of the run's units
    run.lock         storage.lock
    cache/           storage.cache, where no other one is configured
    checkpoint/      the result (checkpoints/<method>/ when methods are compared)
    evaluation/  logs/  report.html
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.atomic_files import json_bytes, sweep_partial_files
from storage.cache import Cache, DamagedRecord, UnitRecord, checked_name
from storage.location import Location, StoreUrl, local_path, parse_location
from storage.lock import LOCK_FILE, driving
from storage.open_place import open_place
from storage.place import Place
from storage.recorded_outputs import RecordedOutputs
from storage.run_prompts import KeptPrompts, Prompts, prompt_differences

FORMAT_VERSION = 2
"""Version of the run directory as a whole."""

REPORT = "report.html"
LOGS = "logs"
EVALUATION = "evaluation"
CACHE = "cache"
UNITS_FILE = "units.json"

_CONFIG_FILE = "config.json"
_READ_AT_ONCE = 16
"""Records: in a bucket reading is a matter of waiting."""


class RunConfigMismatch(ValueError):
    """The run directory belongs to a different configuration."""


class RunFormatUnknown(ValueError):
    """The run directory was written by a newer program, or by one that is too old."""


@dataclass(frozen=True)
class ListedUnit:
    """One unit of a run, as its driver knows it."""

    name: str
    fingerprint: str | None = None
    """None while it depends on results that are not there."""
    needs: tuple[str, ...] = ()
    """The units that it depends on, ``<stage>/<unit>``, as far as they are known."""


class RunDirectory:
    """An existing run directory; get one from :meth:`open` or :meth:`open_or_create`.

    Where it is a folder it is a path-like object: ``Path(run)`` works.
    """

    def __init__(self, location: str | os.PathLike[str] | StoreUrl) -> None:
        self.location = parse_location(location).absolute()

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """The folder. Raises ValueError where the run is in a bucket."""
        return local_path(self.location, why="has no local directory")

    @property
    def place(self) -> Place:
        """The operations on its files."""
        return open_place(self.location)

    @classmethod
    def open(cls, location: str | os.PathLike[str] | StoreUrl) -> RunDirectory:
        """An existing run, as it is.

        Raises:
            ValueError: no run there, or an unreadable ``config.json``.
            RunFormatUnknown: written by a newer program, or one of format 1.
        """
        run = cls(location)
        if not run._has_config():
            raise ValueError(f"{run.location} is not a run directory: it has no {_CONFIG_FILE}")
        run._read_config_file()
        return run

    @classmethod
    def open_or_create(
        cls,
        location: str | os.PathLike[str] | StoreUrl,
        config: dict[str, Any],
        provenance: dict[str, Any],
        *,
        update: bool = False,
        cache: Location | None = None,
        prompts: Prompts | None = None,
    ) -> RunDirectory:
        """The run at ``location``: a new one, or the existing one of the same configuration.

        Args:
            location: local, on a shared file system (made absolute), or ``s3://bucket/prefix``.
            config: the resolved configuration, JSON.
            provenance: versions, commit and the like, JSON; kept from the creation or the last update, not compared.
            update: let a different ``config`` replace the stored one (under the run's lock).
            cache: where its units lie; None: in the run. Another one than before is taken as it is.
            prompts: compared as the configuration is, where the run has kept its own; None: not known.

        Raises:
            RunConfigMismatch: the stored configuration or a prompt differs; lists every differing key.
            RunFormatUnknown: written by a newer program, or one of format 1.
            RunLocked: ``update``, or another ``cache``, while a driver is at work.
            ValueError: a URL of another kind, somebody else's folder, or an unreadable ``config.json``.
        """
        run = cls(location)
        document = {
            "format_version": FORMAT_VERSION,
            "config": config,
            "provenance": provenance,
            "cache": _as_seen_from(run.location, cache),
            **({} if prompts is None else {"prompts": {key: asdict(kept) for key, kept in prompts.items()}}),
        }
        document = json.loads(json.dumps(document, allow_nan=False))
        if not run._has_config():
            run._refuse_foreign_folder()
            with contextlib.suppress(FileExistsError):  # another driver was faster: compare with its file
                run.place.put(_CONFIG_FILE, json_bytes(document), exclusive=True)
                run.write_units({})
        stored = run._read_config_file()
        kept = {key: document[key] for key in ("cache", "prompts") if key in document}
        if run._differences(document["config"], prompts, update=update):
            with run.lock():
                run.write_units({})  # they were of the other configuration
                run.place.put(_CONFIG_FILE, json_bytes(document))
        elif any(stored.get(key) != value for key, value in kept.items()):
            with run.lock():
                run.place.put(_CONFIG_FILE, json_bytes({**stored, **kept}))
        return run

    @classmethod
    def check(
        cls, location: str | os.PathLike[str] | StoreUrl, config: dict[str, Any], *, update: bool = False
    ) -> None:
        """Raise what :meth:`open_or_create` would raise now, but for locks; writes nothing."""
        run = cls(location)
        if run._has_config():
            run._differences(json.loads(json.dumps(config, allow_nan=False)), None, update=update)
        else:
            run._refuse_foreign_folder()

    @classmethod
    def check_prompts(cls, location: str | os.PathLike[str] | StoreUrl, prompts: Prompts) -> None:
        """Raise RunConfigMismatch where a run was made with other prompts; what else :meth:`check` raises, it says too."""
        run = cls(location)
        if run._has_config():
            run._refuse(prompt_differences(run.prompts, prompts))

    @property
    def config(self) -> dict[str, Any]:
        """The stored resolved configuration."""
        config: dict[str, Any] = self._read_config_file()["config"]
        return config

    @property
    def prompts(self) -> Prompts:
        """What the run was made with; empty where it began before they were kept."""
        return {key: KeptPrompts.from_dict(kept) for key, kept in self._read_config_file().get("prompts", {}).items()}

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, commit and the like, of the creation or the last update."""
        provenance: dict[str, Any] = self._read_config_file()["provenance"]
        return provenance

    @property
    def cache(self) -> Cache:
        """The cache that holds its units."""
        return Cache(_seen_from(self.location, str(self._read_config_file()["cache"])))

    def write_units(self, stages: Mapping[str, Sequence[ListedUnit]]) -> None:
        """Keep the units of the stages that are listed, in the stages' order."""
        listed = {stage: [asdict(unit) for unit in units] for stage, units in stages.items()}
        self.place.put(UNITS_FILE, json_bytes({"format_version": FORMAT_VERSION, "stages": listed}))

    def units(self) -> dict[str, tuple[ListedUnit, ...]]:
        """The units that a driver has listed, by stage; a stage whose units are not known yet is not there.

        Raises:
            ValueError: the file is missing or not readable.
        """
        try:
            stages = json.loads(self.place.read(UNITS_FILE))["stages"]
            return {
                stage: tuple(ListedUnit(u["name"], u["fingerprint"], tuple(u["needs"])) for u in units)
                for stage, units in stages.items()
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            path = self.location / UNITS_FILE
            raise ValueError(
                f"{path} is not readable ({error!r}): run it again, and it is written anew; nothing that is done is lost"
            ) from error

    def records(self, *stages: str) -> dict[tuple[str, str], UnitRecord | DamagedRecord]:
        """Records of the listed units, of these stages or of all, by stage and unit; in place of a damaged one, the error that
        says so."""
        cache, found = self.cache, {}
        wanted = {
            (stage, unit.name): unit.fingerprint
            for stage, units in self.units().items()
            if not stages or stage in stages
            for unit in units
        }

        def read(key: tuple[str, str]) -> UnitRecord | DamagedRecord | None:
            try:
                return None if (of := wanted[key]) is None else cache.read(key[0], of)
            except DamagedRecord as error:
                return error

        with ThreadPoolExecutor(_READ_AT_ONCE, thread_name_prefix="records") as pool:
            for key, record in zip(wanted, pool.map(read, wanted), strict=True):
                if record is not None:
                    found[key] = record
        return found

    def outputs(self, records: Mapping[tuple[str, str], UnitRecord]) -> RecordedOutputs:
        """Arrays and files of units with these records, by their logical names."""
        return RecordedOutputs(self.cache.location, self.location, lambda stage, unit: records.get((stage, unit)))

    @staticmethod
    def checkpoint_key(method: str | None = None) -> str:
        """The resulting pipeline folder, relative to the run: of the run, or of one of the methods that it compares."""
        return "checkpoint" if method is None else f"checkpoints/{checked_name('method', method)}"

    def checkpoint(self, method: str | None = None) -> Path:
        """The folder of :meth:`checkpoint_key`; as all paths of a run, a ValueError where it is in a bucket."""
        return self.path / self.checkpoint_key(method)

    @property
    def evaluation(self) -> Path:
        return self.path / EVALUATION

    @property
    def logs(self) -> Path:
        return self.path / LOGS

    @property
    def report(self) -> Path:
        return self.path / REPORT

    def has(self, folder: str) -> bool:
        """Whether there are files in a folder of the run."""
        return bool(self.place.names(folder))

    def sweep(self) -> None:
        """Remove the unfinished files that killed writers left, while holding :meth:`lock`; in a bucket there are none."""
        if isinstance(self.location, Path):
            sweep_partial_files(self.location)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Be the driver of this run. Raises RunLocked (:mod:`storage.lock`)."""
        return driving(self.location)

    def _has_config(self) -> bool:
        return _CONFIG_FILE in self.place.names("")

    def _differences(self, config: dict[str, Any], prompts: Prompts | None, *, update: bool) -> list[str]:
        differences = _differences(self.config, config) + prompt_differences(self.prompts, prompts or {})
        if not update:
            self._refuse(differences)
        return differences

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            raise RunConfigMismatch(
                f"{self.location} was made with another configuration:\n  "
                + "\n  ".join(differences)
                + "\n--update takes the new one and redoes only what depends on these keys; "
                "or give another run directory; or set the keys back"
            )

    def _read_config_file(self) -> dict[str, Any]:
        path = self.location / _CONFIG_FILE
        try:
            document = json.loads(self.place.read(_CONFIG_FILE))
            version = int(document["format_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not readable ({error!r}): restore it, or use another run directory") from error
        if version > FORMAT_VERSION:
            raise RunFormatUnknown(
                f"{self.location} has format {version}, this program knows {FORMAT_VERSION}: use the newer program, or another "
                "run directory"
            )
        if version < FORMAT_VERSION:
            raise RunFormatUnknown(
                f"{self.location} is a run of format {version}, whose units this program does not read (it knows format "
                f"{FORMAT_VERSION}): give another run directory, and its work is done anew; its checkpoint/ stays as it is, "
                "for from_pretrained and `verify`; or finish it with the program that began it"
            )
        if not isinstance(document.get("config"), dict) or not isinstance(document.get("provenance"), dict):
            raise ValueError(f"{path} lacks config or provenance: restore it, or use another run directory")
        return dict(document)

    def _refuse_foreign_folder(self) -> None:
        if isinstance(self.location, Path) and self.location.is_file():
            raise ValueError(f"{self.location} is a file: give a directory for the run")
        entries = {*self.place.names(""), *self.place.subfolders("")}
        foreign = sorted(entries - {LOCK_FILE, _CONFIG_FILE})
        if foreign:
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise ValueError(
                f"{self.location} is not empty and not a run (holds {shown}): give a new or empty directory"
            )


def _as_seen_from(run: Location, cache: Location | None) -> str:
    """Relative to the run where both may move together: the cache is in the run, or beside or above it."""
    if cache is None:
        return CACHE
    try:
        if isinstance(run, StoreUrl) is not isinstance(cache, StoreUrl):
            return str(cache)
        run.relative_to(cache.parent)  # type: ignore[arg-type]
    except ValueError:
        return str(cache)
    return os.path.relpath(_text(cache), _text(run))


def _seen_from(run: Location, cache: str) -> Location:
    if cache.startswith(("/", "s3://")):
        return parse_location(cache)
    joined = posixpath.normpath(f"{_text(run)}/{cache}")
    return StoreUrl(run.bucket, joined.removeprefix("/")) if isinstance(run, StoreUrl) else Path(joined)


def _text(location: Location) -> str:
    return f"/{location.key}" if isinstance(location, StoreUrl) else str(location)


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
