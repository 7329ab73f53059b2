"""Which units are done: their record is in the cache, and all its files have the recorded size and checksum.

Files that look as they did when they were last hashed are not hashed again (`storage.hashed_files`). A unit whose record or
files are damaged is not done any more.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.context import Run
from pipeline.stages.stage import StageUnit
from storage.cache import DamagedRecord, UnitRecord
from storage.hashed_files import HashedFiles
from storage.location import Location, StoreUrl


class DoneUnits:
    """Finds them, each once.

    Args:
        rehash: hash all files again, whatever they look like.
        damaged: called with a run, a stage, a unit's name and what is wrong with it.
    """

    def __init__(self, damaged: Callable[[Run, str, str, list[str]], None], *, rehash: bool = False) -> None:
        self._damaged, self._rehash = damaged, rehash
        self._sound: dict[tuple[Location, str], UnitRecord] = {}
        self._hashed: dict[Location, HashedFiles] = {}

    def find(self, run: Run, stage: str, unit: StageUnit) -> UnitRecord | None:
        """The record of a unit that is done."""
        place = run.directory.location if unit.in_run else run.cache.location
        key = (place, f"{stage}/{unit.fingerprint}")
        if key not in self._sound:
            record = self._read(run, stage, unit)
            if record is None:
                return None
            self._sound[key] = record
        return self._sound[key]

    def finished(self, run: Run, record: UnitRecord) -> None:
        """A worker has done it: whoever wrote the files has hashed them."""
        place, folder = run.cache.files_of(record, run.directory.place)
        if isinstance(place.location, StoreUrl):  # e_tags say more
            return
        hashed = self._hashed_of(place.location)
        for output in record.outputs:
            key = f"{folder}/{output.path}" if folder else output.path
            hashed.note(key, place.stat(key), output.checksum)
        hashed.flush()

    def _read(self, run: Run, stage: str, unit: StageUnit) -> UnitRecord | None:
        try:
            record = run.cache.read(stage, unit.fingerprint)
            if record is None:
                return None
            place, _ = run.cache.files_of(record, run.directory.place)
            problems = run.cache.problems(
                record, run.directory.place, deep=True, hashed=self._hashed_of(place.location)
            )
        except DamagedRecord as error:
            problems = [str(error)]
        if not problems:
            return record
        if unit.in_run and not run.directory.has(unit.payload.checkpoint):
            return None  # another run of the cache has it, this one has not yet
        self._damaged(run, stage, unit.name, problems)
        if not unit.in_run:
            run.cache.remove(stage, unit.fingerprint)
        return None

    def _hashed_of(self, location: Location) -> HashedFiles:
        if location not in self._hashed:
            self._hashed[location] = HashedFiles(location)
            if self._rehash:
                self._hashed[location].forget()
        return self._hashed[location]
