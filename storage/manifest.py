"""What is done: one immutable record a unit, ``manifest/<stage>/<unit>.json``, written last and atomically.

The presence of the record is the only meaning of "done". It is written after the unit's outputs are durable and lists
size and SHA-256 of each: a lost output is seen although Zarr would read it as zeros.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from storage.atomic_files import create_directory, sha256_file, sync_directory, sync_file, write_json_atomic

FORMAT_VERSION = 1
"""Version of a record file."""

ALWAYS_HASHED_BYTES = 64 * 1024
"""Files up to this size (metadata, mostly) are hashed by every check, deep or not."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}")


class DamagedRecord(ValueError):
    """A manifest record that cannot be what was written."""


@dataclass(frozen=True)
class OutputFile:
    """One file that a unit wrote."""

    path: str
    """Relative to the run directory, POSIX, inside it."""
    num_bytes: int
    checksum: str
    """SHA-256, 64 hex digits."""

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        if not parts or self.path.startswith("/") or ".." in parts or "\0" in self.path:
            raise ValueError(f"output path {self.path!r} must be relative and stay inside the run directory")

    @classmethod
    def describe(cls, path: Path, *, run: "str | os.PathLike[str]") -> "OutputFile":
        """Sync the finished file ``path`` and its directory to disk, and describe it relative to ``run``."""
        sync_file(path)
        sync_directory(path.parent)
        return cls(path.relative_to(run).as_posix(), path.stat().st_size, sha256_file(path))


@dataclass(frozen=True)
class UnitRecord:
    """That a unit is done, with what, and what it cost."""

    stage: str
    unit: str
    fingerprint: str
    """:func:`fingerprint` of everything that the outputs depend on."""
    outputs: tuple[OutputFile, ...]
    result: dict[str, Any]
    """Small JSON that later stages or the report read."""
    seconds: float
    host: str
    device: str
    peak_memory_bytes: int
    attempt: int
    """1 for the first."""
    worker: str


class Manifest:
    """The records of one run.

    Args:
        run: the run directory (a path, or a ``RunDirectory``).
    """

    def __init__(self, run: str | os.PathLike[str]) -> None:
        self.run = Path(run)
        self.root = self.run / "manifest"

    def read(self, stage: str, unit: str) -> UnitRecord | None:
        """The record, or ``None`` if the unit is not done.

        Raises:
            DamagedRecord: the file is there but is not what was written; names it and says what to do.
        """
        path = self._path(stage, unit)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        return _parse_record(path, raw, stage, unit)

    def write(self, record: UnitRecord) -> None:
        """Declare a unit done: durable and visible at once when this returns; replaces an older record.

        Raises:
            ValueError: an output is not there in its full size, or ``result`` is not JSON (NaN included).
        """
        problems = self.missing_or_damaged(record, deep=False)
        if problems:
            raise ValueError(f"unit {record.stage}/{record.unit} is not done: " + "; ".join(problems))
        path = self._path(record.stage, record.unit)
        body = {"format_version": FORMAT_VERSION, **asdict(record)}
        document = {**body, "digest": _digest(body)}
        create_directory(path.parent)
        write_json_atomic(path, document)

    def records(self, stage: str) -> tuple[UnitRecord, ...]:
        """All records of a stage, by unit name. Raises what :meth:`read` raises."""
        folder = self.root / _checked_name("stage", stage)
        units = sorted(path.stem for path in folder.glob("*.json") if not path.name.startswith("."))
        found = (self.read(stage, unit) for unit in units)
        return tuple(record for record in found if record is not None)

    def remove(self, stage: str, unit: str) -> None:
        """Declare a unit not done; its outputs stay until it is done again. No record is fine."""
        path = self._path(stage, unit)
        if path.exists():
            path.unlink(missing_ok=True)
            sync_directory(path.parent)

    def missing_or_damaged(self, record: UnitRecord, *, deep: bool) -> list[str]:
        """What is wrong with the outputs of ``record``: empty if nothing is.

        Args:
            record: a unit's record.
            deep: hash every file (reads it all); otherwise presence, size, and the hash of small files.
        """
        return [problem for output in record.outputs if (problem := self._problem(output, deep=deep))]

    def _problem(self, output: OutputFile, *, deep: bool) -> str | None:
        path = self.run / output.path
        if not path.is_file():
            return f"{output.path}: missing"
        if not path.resolve().is_relative_to(self.run.resolve()):
            return f"{output.path}: a link out of the run directory"
        num_bytes = path.stat().st_size
        if num_bytes != output.num_bytes:
            return f"{output.path}: {num_bytes} bytes, {output.num_bytes} expected"
        if (deep or num_bytes <= ALWAYS_HASHED_BYTES) and sha256_file(path) != output.checksum:
            return f"{output.path}: SHA-256 differs from the record"
        return None

    def _path(self, stage: str, unit: str) -> Path:
        return self.root / _checked_name("stage", stage) / f"{_checked_name('unit', unit)}.json"


def fingerprint(parts: dict[str, Any]) -> str:
    """32 hex digits of the SHA-256 of ``parts`` as canonical JSON: equal for equal content, whatever the key order.

    Raises:
        ValueError: NaN or infinity inside.
        TypeError: something inside is not JSON.
    """
    return _digest(parts)[:32]


def _digest(value: dict[str, Any]) -> str:
    # Once through JSON first: keys that are numbers sort differently before and after they become text.
    plain = json.loads(json.dumps(value, allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _checked_name(kind: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{kind} name {name!r} must be 1-200 letters, digits or . _ = + -, beginning with a letter or digit"
        )
    return name


def _parse_record(path: Path, raw: bytes, stage: str, unit: str) -> UnitRecord:
    advice = f"delete {path} and run again: the unit is redone"
    try:
        document = json.loads(raw)
        version, digest = int(document["format_version"]), document.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRecord(f"record {path} is not readable ({error!r}): {advice}") from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"record {path} has format {version}, this program knows up to {FORMAT_VERSION}: use the newer program"
        )
    if digest != _digest(document):
        raise DamagedRecord(f"record {path} does not match its own digest: {advice}")
    del document["format_version"]
    if (document["stage"], document["unit"]) != (stage, unit):
        raise DamagedRecord(f"record {path} belongs to {document['stage']}/{document['unit']}: {advice}")
    outputs = tuple(OutputFile(**output) for output in document.pop("outputs"))
    return UnitRecord(outputs=outputs, **document)
