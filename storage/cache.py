"""What is done: units by their fingerprint, for as many runs as share the cache.

::

    <cache>/<stage>/<fingerprint>/record.json        created once, last: its presence is the only meaning of "done"
    <cache>/<stage>/<fingerprint>/<attempt>/...      one attempt's files: a Zarr group, block artifacts, videos

Every attempt has a folder of its own, and the record names one of them with the size and SHA-256 of its files. Readers open
only what a record names. So two drivers do some work twice and never harm each other, also where results are not the same to
the bit. The files of a record without an attempt, a checkpoint's, lie in the run (:attr:`UnitRecord.attempt`).

A record is removed where its files are found damaged, by a driver that holds its run's lock, and by ``gc``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from storage.atomic_files import json_bytes
from storage.hashed_files import NAME as HASHED
from storage.hashed_files import HashedFiles
from storage.location import Location
from storage.lock import USERS_FILE
from storage.open_place import open_place
from storage.output_file import OutputFile
from storage.place import Place

FORMAT_VERSION = 2
"""Version of a record, and of all that a fingerprint stands for."""
RECORD = "record.json"
ALWAYS_HASHED_BYTES = 64 * 1024
"""Files up to this size (metadata, mostly) are hashed by every check, deep or not."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}")
_ENTRY, _ATTEMPT = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{16}")
"""Names of the folders of units and attempts; nothing else in a cache's folder is ever removed."""


class DamagedRecord(ValueError):
    """A record that cannot be what was written."""


@dataclass(frozen=True)
class UnitRecord:
    """That a unit is done, with what, and what it cost."""

    stage: str
    unit: str
    fingerprint: str
    """:func:`fingerprint` of everything that the outputs depend on."""
    attempt: str | None
    """Folder of the files, beside the record; None: the files are the run's own, and their paths relative to the run."""
    outputs: tuple[OutputFile, ...]
    result: dict[str, Any]
    """Small JSON that later stages or the report read."""
    seconds: float
    host: str
    device: str
    peak_memory_bytes: int
    tries: int
    """1: the first one succeeded."""
    worker: str

    @property
    def key(self) -> str:
        """Key of its folder in the cache."""
        return entry_key(self.stage, self.fingerprint)


class Cache:
    """The records and files below one location."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.place = open_place(location)

    def read(self, stage: str, fingerprint: str) -> UnitRecord | None:
        """The record, or ``None`` if the unit is not done.

        Raises:
            DamagedRecord: the file is there but is not what was written; names it and says what to do.
        """
        key = f"{entry_key(stage, fingerprint)}/{RECORD}"
        try:
            raw = self.place.read(key)
        except FileNotFoundError:
            return None
        return _parse_record(self.location / key, raw, stage, fingerprint)

    def create(self, record: UnitRecord, run: Place) -> UnitRecord:
        """Declare a unit done: durable and visible at once when this returns.

        Args:
            record: its files are there.
            run: where the files of a record without an attempt lie.

        Returns:
            the record that stands: another one, where another driver was faster.

        Raises:
            ValueError: an output is not there in its full size, or ``result`` is not JSON (NaN included).
        """
        if problems := self.problems(record, run, deep=False):
            raise ValueError(f"unit {record.stage}/{record.unit} is not done: " + "; ".join(problems))
        body = {"format_version": FORMAT_VERSION, **asdict(record)}
        data = json_bytes({**body, "digest": _digest(body)})
        while True:
            try:
                self.place.put(f"{record.key}/{RECORD}", data, exclusive=True)
            except FileExistsError:
                standing = self.read(record.stage, record.fingerprint)
                # The run has this checkpoint by now, of other bytes perhaps: those of another version of a library.
                if record.attempt is None and standing is not None and standing.outputs != record.outputs:
                    self.remove(record.stage, record.fingerprint)
                elif standing is not None:
                    return standing
            else:
                return record

    def remove(self, stage: str, fingerprint: str) -> None:
        """Declare a unit not done; its files stay. Fine if it is not."""
        self.place.remove(f"{entry_key(stage, fingerprint)}/{RECORD}")

    def files_of(self, record: UnitRecord, run: Place) -> tuple[Place, str]:
        """The place of a record's files, and the key of their folder in it ('' for the run's own)."""
        return (run, "") if record.attempt is None else (self.place, f"{record.key}/{record.attempt}")

    def problems(self, record: UnitRecord, run: Place, *, deep: bool, hashed: HashedFiles | None = None) -> list[str]:
        """What is wrong with the outputs of a record: empty if nothing is.

        Args:
            record: a unit's record.
            run: where the files of a record without an attempt lie.
            deep: hash every file (reads it all); otherwise presence, size, and the hash of small files. An object whose e_tag
                is still the one it was written with has its content still, and is not read.
            hashed: knows which files of the record's place look as they did when they were hashed last, and is told.
        """
        place, folder = self.files_of(record, run)
        with place.listed(folder or str(record.result.get("checkpoint", ""))):
            found = [_problem(place, _joined(folder, output.path), output, deep, hashed) for output in record.outputs]
        problems = [problem for problem in found if problem]
        if hashed is not None:
            hashed.flush()
        return problems

    def entries(self) -> Iterator[tuple[str, str]]:
        """Stage and fingerprint of every entry, done or not."""
        for stage in self.place.subfolders():
            for fingerprint in self.place.subfolders(stage):
                if _ENTRY.fullmatch(fingerprint):
                    yield stage, fingerprint

    def foreign(self) -> list[str]:
        """Keys that no driver has put there: the folder is no cache, or not a cache alone."""
        folders = [stage for stage in self.place.subfolders() if not stage.startswith(".")]
        files = [name for name in self.place.names("") if not name.startswith(".") and name not in (HASHED, USERS_FILE)]
        inside = [
            f"{stage}/{name}"
            for stage in folders
            for name in (*self.place.subfolders(stage), *self.place.names(stage))
            if not name.startswith(".") and not _ENTRY.fullmatch(name)
        ]
        return sorted([*files, *inside])

    def sweep(self) -> None:
        """Remove the attempts that no record names, while nobody else writes into the cache."""
        for key in list(self.dead_attempts()):
            self.place.remove(key)

    def dead_attempts(self) -> Iterator[str]:
        """Keys of the attempts that no record names: of killed workers, or of units at work now."""
        for stage, fingerprint in self.entries():
            entry = entry_key(stage, fingerprint)
            attempts = self.place.subfolders(entry)
            try:
                record = self.read(stage, fingerprint) if attempts else None
            except ValueError:
                continue
            named = None if record is None else record.attempt
            yield from (f"{entry}/{a}" for a in attempts if a != named and _ATTEMPT.fullmatch(a))


def is_units(key: str) -> bool:
    """Whether a key in a cache is that of a unit's record, or of a file of an attempt."""
    parts = key.split("/")
    return len(parts) > 2 and bool(_ENTRY.fullmatch(parts[1]) and (parts[2] == RECORD or _ATTEMPT.fullmatch(parts[2])))


def entry_key(stage: str, fingerprint: str) -> str:
    """Key of a unit's folder in a cache. Raises ValueError for what cannot be a folder's name."""
    return f"{checked_name('stage', stage)}/{checked_name('fingerprint', fingerprint)}"


def fingerprint(parts: dict[str, Any]) -> str:
    """32 hex digits of the SHA-256 of ``parts`` as canonical JSON: equal for equal content, whatever the key order.

    Raises:
        ValueError: NaN or infinity inside.
        TypeError: something inside is not JSON.
    """
    return _digest(parts)[:32]


def checked_name(kind: str, name: str) -> str:
    """The name, which may be that of a folder or a file. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{kind} name {name!r} must be 1-200 letters, digits or . _ = + -, beginning with a letter or digit"
        )
    return name


def _joined(folder: str, path: str) -> str:
    return f"{folder}/{path}" if folder else path


def _problem(place: Place, key: str, output: OutputFile, deep: bool, hashed: HashedFiles | None) -> str | None:
    try:
        found = place.stat(key)
    except FileNotFoundError:
        return f"{key}: missing"
    except ValueError as error:
        return f"{key}: {error}"
    if found.num_bytes != output.num_bytes:
        return f"{key}: {found.num_bytes} bytes, {output.num_bytes} expected"
    if output.e_tag is not None and output.e_tag == found.e_tag:
        return None
    small = found.num_bytes <= ALWAYS_HASHED_BYTES
    if not small and hashed is not None and hashed.holds(key, found, output.checksum):
        return None
    if (deep or small) and place.checksum(key) != output.checksum:
        return f"{key}: SHA-256 differs from the record"
    if hashed is not None and (deep or small):
        hashed.note(key, found, output.checksum)
    return None


def _digest(value: dict[str, Any]) -> str:
    # Once through JSON first: keys that are numbers sort differently before and after they become text.
    plain = json.loads(json.dumps(value, allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse_record(path: Location, raw: bytes, stage: str, fingerprint: str) -> UnitRecord:
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
    if (document["stage"], document["fingerprint"]) != (stage, fingerprint):
        raise DamagedRecord(f"record {path} belongs to {document['stage']}/{document['fingerprint']}: {advice}")
    outputs = tuple(OutputFile(**output) for output in document.pop("outputs"))
    return UnitRecord(outputs=outputs, **document)
