"""Stores of single units in a folder or a bucket, and their records, without workers."""

from typing import Any

from storage.cache import UnitRecord, fingerprint
from storage.location import Location
from storage.unit_store import UnitAddress, UnitStore

U = "trajectories/u/"
"""Begins the names of the unit's outputs."""


def unit_store(run: Location, unit: str = "u", *, stage: str = "trajectories", **inputs: str) -> UnitStore:
    """The store of a unit, to be opened by `with`; `inputs` are fingerprints of other trajectories by name."""
    needs = {f"trajectories/{name}": found for name, found in inputs.items()}
    return UnitStore(UnitAddress(run / "cache", run, stage, unit, fingerprint({"unit": unit}), needs))


def record_of(store: UnitStore, unit: str = "u", *, stage: str = "trajectories", **changes: Any) -> UnitRecord:
    """The record of all that was written into an open store, which is published by it."""
    outputs = store.publish()
    values: dict[str, Any] = {
        "stage": stage, "unit": unit, "fingerprint": fingerprint({"unit": unit}), "attempt": store.attempt, "outputs": outputs,
        "result": {}, "seconds": 1.0, "host": "host", "device": "cpu", "peak_memory_bytes": 1, "tries": 1, "worker": "w",
    }  # fmt: skip
    return UnitRecord(**{**values, **changes})


def done(run: Location, unit: str, **tensors: Any) -> UnitRecord:
    """Has a unit write arrays, and records it."""
    with unit_store(run, unit) as store:
        for name, tensor in tensors.items():
            store.write(f"trajectories/{unit}/{name}", tensor)
        return store.cache.create(record_of(store, unit), store.run)
