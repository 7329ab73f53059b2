"""A run's cache driven by hand: units are done by workers or written by a test, recorded, and read by later ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from storage.cache import Cache, UnitRecord, fingerprint
from storage.recorded_outputs import RecordedOutputs
from storage.unit_store import UnitAddress, UnitStore
from workers.messages import UnitOutput


def ignore(done: int, total: int) -> None:
    """Takes no note of progress."""


class UnitCache:
    """The units of one run."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.records: dict[tuple[str, str], UnitRecord] = {}

    def address(self, stage: str, unit: str) -> UnitAddress:
        """Of a unit that reads whatever is done."""
        inputs = {"/".join(key): record.fingerprint for key, record in self.records.items()}
        return UnitAddress(self.run / "cache", self.run, stage, unit, fingerprint({stage: unit}), inputs)

    def do(
        self, worker: Any, stage: str, unit: Any, progress: Callable[[int, int], None] = ignore, **changes: Any
    ) -> UnitOutput:
        """Has a worker do a unit, and records it; `changes` are those of its name."""
        name = changes.get("name", unit.name)
        with UnitStore(self.address(stage, name)) as store:
            output: UnitOutput = worker.run(unit, progress, store)
            output = replace(output, outputs=store.publish(), attempt=store.attempt)
        self._record(stage, name, output, store)
        return output

    def shadow(self, worker: Any, stage: str, unit: Any) -> None:
        """Has a worker take part in a unit that another process does."""
        worker.shadow(unit, ignore, UnitStore(self.address(stage, unit.name)))

    def see(self, stage: str, *units: str) -> None:
        """Waits for units that another process does."""
        for unit in units:
            record, deadline = None, time.monotonic() + 60
            while record is None:
                assert time.monotonic() < deadline, f"{stage}/{unit} is not done"
                record = Cache(self.run / "cache").read(stage, fingerprint({stage: unit}))
            self.records[stage, unit] = record

    def write(self, stage: str, unit: str, arrays: Mapping[str, Tensor]) -> None:
        """Records a unit with these arrays."""
        with UnitStore(self.address(stage, unit)) as store:
            for name, tensor in arrays.items():
                store.write(f"{stage}/{unit}/{name}", tensor)
            self._record(stage, unit, UnitOutput({}, "cpu", 0, outputs=store.publish(), attempt=store.attempt), store)

    def write_file(self, stage: str, unit: str, name: str, write: Callable[[Path], object]) -> str:
        """Records a unit with one file; returns the file's logical name."""
        with UnitStore(self.address(stage, unit)) as store:
            store.write_file(f"{stage}/{unit}/{name}", write)
            self._record(stage, unit, UnitOutput({}, "cpu", 0, outputs=store.publish(), attempt=store.attempt), store)
        return f"{stage}/{unit}/{name}"

    def put_checkpoint(self, name: str) -> str:
        """Records a checkpoint that lies in the run; returns the logical name of its unit."""
        record = UnitRecord(
            "assembly",
            name,
            fingerprint({"assembly": name}),
            None,
            (),
            {"checkpoint": name},
            0.0,
            "h",
            "cpu",
            0,
            1,
            "w",
        )
        store = UnitStore(self.address("assembly", name))
        self.records["assembly", name] = store.cache.create(record, store.run)
        return f"assembly/{name}"

    def load(self) -> UnitCache:
        """Takes all records that are in the cache; returns itself."""
        cache = Cache(self.run / "cache")
        for record in (cache.read(*entry) for entry in cache.entries()):
            assert record is not None
            self.records[record.stage, record.unit] = record
        return self

    def contents(self) -> dict[str, bytes]:
        """All files of all units, by logical name."""
        names = [f"{r.stage}/{r.unit}/{output.path}" for r in self.records.values() for output in r.outputs]
        return {name: self.outputs.file(name).read_bytes() for name in sorted(names)}

    @property
    def outputs(self) -> RecordedOutputs:
        """All that was recorded."""
        return RecordedOutputs(self.run / "cache", self.run, lambda stage, unit: self.records.get((stage, unit)))

    def _record(self, stage: str, unit: str, output: UnitOutput, store: UnitStore) -> None:
        store.cache.remove(stage, fingerprint({stage: unit}))  # it may be done again
        record = UnitRecord(
            stage, unit, fingerprint({stage: unit}), output.attempt, output.outputs, dict(output.result), 0.0, "h", "cpu", 0, 1,
            "w",
        )  # fmt: skip
        self.records[stage, unit] = store.cache.create(record, store.run)
