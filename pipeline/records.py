"""What a driver knows of the units of one run: the records of those that are done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from storage.cache import UnitRecord


class Records:
    """Records of the units that are done and of the run's present configuration. Who asks for one depends on it."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], UnitRecord] = {}
        self._asked: set[tuple[str, str]] = set()

    def add(self, record: UnitRecord) -> None:
        """From now on the unit is done."""
        self._found[record.stage, record.unit] = record

    def read(self, stage: str, unit: str) -> UnitRecord | None:
        """The record, if the unit is done."""
        self._asked.add((stage, unit))
        return self._found.get((stage, unit))

    def all(self) -> dict[tuple[str, str], UnitRecord]:
        """All records, by stage and unit."""
        return dict(self._found)

    @contextlib.contextmanager
    def needs(self) -> Iterator[dict[str, str | None]]:
        """Collects the units that are asked for inside, `stage/unit`, with their fingerprints; None for those not done."""
        self._asked = set()
        needed: dict[str, str | None] = {}
        try:
            yield needed
        finally:
            for key in sorted(self._asked):
                record = self._found.get(key)
                needed["/".join(key)] = None if record is None else record.fingerprint
