"""What is done: one immutable record a unit, ``manifest/<stage>/<unit>.json``, written last and atomically.

The presence of the record is the only meaning of "done". It is written after the unit's outputs are durable and lists
size and SHA-256 of each: a lost output is seen although Zarr would read it as zeros.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from storage.atomic_files import json_bytes
from storage.hashed_files import HashedFiles
from storage.location import Location, StoreUrl, local_path, parse_location
from storage.open_store import open_store
from storage.output_file import OutputFile as OutputFile
from storage.run_store import StoredFile

FORMAT_VERSION = 1
"""Version of a record file."""

ALWAYS_HASHED_BYTES = 64 * 1024
"""Files up to this size (metadata, mostly) are hashed by every check, deep or not."""

T = TypeVar("T")
R = TypeVar("R")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}")


class DamagedRecord(ValueError):
    """A manifest record that cannot be what was written."""


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
        run: where the run lies (a path, a URL, or a ``RunDirectory``).
    """

    def __init__(self, run: "str | os.PathLike[str] | StoreUrl") -> None:
        self.location = parse_location(run)
        self._store = open_store(self.location)

    @property
    def run(self) -> Path:
        """The run directory. Raises ValueError where it is in a bucket."""
        return local_path(self.location, why="has no local directory")

    @property
    def root(self) -> Path:
        """The records' directory. Raises as :attr:`run`."""
        return self.run / "manifest"

    def read(self, stage: str, unit: str) -> UnitRecord | None:
        """The record, or ``None`` if the unit is not done.

        Raises:
            DamagedRecord: the file is there but is not what was written; names it and says what to do.
        """
        key = _key(stage, unit)
        try:
            raw = self._store.read(key)
        except FileNotFoundError:
            return None
        return _parse_record(self.location / key, raw, stage, unit)

    def write(self, record: UnitRecord) -> None:
        """Declare a unit done: durable and visible at once when this returns; replaces an older record.

        Raises:
            ValueError: an output is not there in its full size, or ``result`` is not JSON (NaN included).
            LeaseLost: a later driver has recorded the unit.
        """
        problems = self.missing_or_damaged(record, deep=False)
        if problems:
            raise ValueError(f"unit {record.stage}/{record.unit} is not done: " + "; ".join(problems))
        body = {"format_version": FORMAT_VERSION, **asdict(record)}
        for output in body["outputs"]:
            if output["e_tag"] is None:
                del output["e_tag"]
        epoch = self._store.epoch
        if epoch:
            body["epoch"] = epoch
        document = {**body, "digest": _digest(body)}
        key = _key(record.stage, record.unit)
        self._store.put_record(key, json_bytes(document), is_newer=lambda raw: _epoch_of(raw) > epoch)

    def units(self, stage: str) -> list[str]:
        """Names of the units that have a record, sound or not; sorted."""
        names = self._store.names(f"manifest/{_checked_name('stage', stage)}")
        return [name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")]

    def records(self, stage: str) -> tuple[UnitRecord, ...]:
        """All records of a stage, by unit name. Raises what :meth:`read` raises."""
        found = self.read_stage(stage)
        for record in found.values():
            if isinstance(record, DamagedRecord):
                raise record
        return tuple(record for record in found.values() if isinstance(record, UnitRecord))

    def read_stage(self, stage: str) -> dict[str, UnitRecord | DamagedRecord]:
        """All records of a stage by unit name; in place of one that is damaged, the error that says so."""

        def read(unit: str) -> UnitRecord | DamagedRecord | None:
            try:
                return self.read(stage, unit)
            except DamagedRecord as error:
                return error

        units = self.units(stage)
        found = zip(units, self._side_by_side(read, units), strict=True)
        return {unit: record for unit, record in found if record is not None}

    def remove(self, stage: str, unit: str) -> None:
        """Declare a unit not done; its outputs stay until it is done again. No record is fine."""
        self._store.remove(_key(stage, unit))

    def stat(self, output: OutputFile) -> StoredFile:
        """What the store knows of an output. Raises FileNotFoundError."""
        return self._store.stat(output.path)

    def missing_or_damaged(self, record: UnitRecord, *, deep: bool) -> list[str]:
        """What is wrong with the outputs of ``record``: empty if nothing is.

        Args:
            record: a unit's record.
            deep: hash every file (reads it all); otherwise presence, size, and the hash of small files. An object
                whose e_tag is still the one it was written with has its content still, and is not read.
        """
        found = self._side_by_side(lambda output: self._problem(output, deep=deep), record.outputs)
        return [problem for problem in found if problem]

    def _side_by_side(self, request: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Of every item, in order; where the store is a matter of waiting, many at a time."""
        if self._store.num_requests == 1 or len(items) < 2:
            return [request(item) for item in items]
        with ThreadPoolExecutor(min(self._store.num_requests, len(items)), thread_name_prefix="manifest") as pool:
            return list(pool.map(request, items))

    def _problem(self, output: OutputFile, *, deep: bool) -> str | None:
        try:
            found = self._store.stat(output.path)
        except FileNotFoundError:
            return f"{output.path}: missing"
        except ValueError as error:
            return f"{output.path}: {error}"
        if found.num_bytes != output.num_bytes:
            return f"{output.path}: {found.num_bytes} bytes, {output.num_bytes} expected"
        if output.e_tag is not None and output.e_tag == found.e_tag:
            return None
        if (deep or found.num_bytes <= ALWAYS_HASHED_BYTES) and self._store.checksum(output.path) != output.checksum:
            return f"{output.path}: SHA-256 differs from the record"
        return None


class HeldManifest(Manifest):
    """The records of a run whose lock this process holds: nobody else writes them, so that each is read once."""

    def __init__(self, run: "str | os.PathLike[str] | StoreUrl") -> None:
        super().__init__(run)
        self._found: dict[tuple[str, str], UnitRecord] = {}
        self.hashed = HashedFiles(self._store)
        """Outputs that need not be read again."""

    def read(self, stage: str, unit: str) -> UnitRecord | None:
        """As of every manifest."""
        if (stage, unit) not in self._found:
            record = super().read(stage, unit)
            if record is None:
                return None
            self._found[stage, unit] = record
        return self._found[stage, unit]

    def write(self, record: UnitRecord) -> None:
        """As of every manifest."""
        self._found.pop((record.stage, record.unit), None)
        super().write(record)
        self.hashed.note(record.outputs)  # whoever wrote them has hashed them

    def remove(self, stage: str, unit: str) -> None:
        """As of every manifest."""
        self._found.pop((stage, unit), None)
        super().remove(stage, unit)


def _key(stage: str, unit: str) -> str:
    return f"manifest/{_checked_name('stage', stage)}/{_checked_name('unit', unit)}.json"


def _epoch_of(raw: bytes) -> int:
    """Of the driver that wrote a record; 0 for one that is not readable, which anybody may replace."""
    try:
        return int(json.loads(raw).get("epoch", 0))
    except (ValueError, AttributeError, TypeError):
        return 0


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


def _parse_record(path: Location, raw: bytes, stage: str, unit: str) -> UnitRecord:
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
    document.pop("epoch", None)
    if (document["stage"], document["unit"]) != (stage, unit):
        raise DamagedRecord(f"record {path} belongs to {document['stage']}/{document['unit']}: {advice}")
    outputs = tuple(OutputFile(**output) for output in document.pop("outputs"))
    return UnitRecord(outputs=outputs, **document)
