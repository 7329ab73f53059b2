"""One process for the units of all stages and runs: it becomes the worker that the next unit asks for."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from storage.unit_store import UnitAddress, UnitStore
from workers.hub_snapshot import is_fetching
from workers.kept_pipeline import let_go
from workers.messages import Progress, UnitOutput
from workers.out_of_memory import GENERATION_ADVICE, is_out_of_memory, out_of_memory
from workers.process import release_memory
from workers.usage import measured

_logger = logging.getLogger(__name__)

LOADING_S = 1800.0
"""So long the construction of a worker may take before its silence counts."""
_REPORT_INTERVAL_S = 1.0


@dataclass(frozen=True)
class SharedUnit:
    """A unit, and the worker that does it."""

    worker_class: type[Any]
    settings: Any
    payload: Any
    address: UnitAddress
    """Where its files lie, and those that it reads."""
    name: str = "the unit"
    """Stage and name, for people."""
    planned_bytes: int | None = None
    """What the plan says one worker of the stage takes."""


class SharedWorker:
    """Has no settings of its own; its units carry everything.

    The worker of the last unit is kept as long as class and settings are equal, with what it has opened: hand out units of
    equal ones one after the other.

    Worker classes may have:

    - `BESIDE_KEPT_PIPELINE = True`: they use the full-precision pipeline that is kept (`workers.kept_pipeline`), or leave it
      room; for others it is let go;
    - `save_memory()`, after which a worker takes less memory for the same result, and `MEMORY_ADVICE`, ways out for people
      where memory is short. A worker whose unit ran out of memory is dropped.
    """

    def __init__(self, settings: None) -> None:
        self._made_of: tuple[type[Any], Any] | None = None
        self._worker: Any = None
        self._ahead: SharedUnit | None = None
        self._told_to_save = False
        self._savers: list[tuple[type[Any], Any]] = []
        """Class and settings of the workers that save memory."""

    def prepare(self, unit: SharedUnit) -> None:
        """Has the worker of the next unit prepare this one, if it is the worker of both."""
        self._ahead = unit

    def save_memory(self) -> None:
        """Gives back what an attempt has left; the next unit's worker, and all for units like it, save memory from now on."""
        self._told_to_save = True
        release_memory()

    def run(self, unit: SharedUnit, progress: Progress) -> UnitOutput:
        """Does the unit as a worker of its own would.

        Raises:
            OutOfMemory: and whatever else the worker raises.
        """
        with self._memory_watched(unit), UnitStore(unit.address) as store:
            began = time.perf_counter()
            worker = self._worker_of(unit, progress)
            with measured(load_s=time.perf_counter() - began) as meter:
                output: UnitOutput = worker.run(unit.payload, progress, store)
                outputs = store.publish()
                return replace(
                    output, outputs=outputs, attempt=store.attempt, usage=meter.usage(), lean=self._saves(unit)
                )

    def shadow(self, unit: SharedUnit, progress: Progress) -> None:
        """Takes part in a replica's unit as a worker of its own would."""
        with self._memory_watched(unit), contextlib.closing(UnitStore(unit.address)) as store:
            self._worker_of(unit, progress).shadow(unit.payload, progress, store)

    @contextlib.contextmanager
    def _memory_watched(self, unit: SharedUnit) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._worker = self._made_of = None
            let_go()
            advice = getattr(unit.worker_class, "MEMORY_ADVICE", GENERATION_ADVICE)
            raise out_of_memory(
                unit.name, error, advice=advice, lean=self._saves(unit), planned_bytes=unit.planned_bytes
            ) from error

    def _saves(self, unit: SharedUnit) -> bool:
        return (unit.worker_class, unit.settings) in self._savers

    def _worker_of(self, unit: SharedUnit, progress: Progress) -> Any:
        wanted = (unit.worker_class, unit.settings)
        told, self._told_to_save = self._told_to_save, False
        if told and hasattr(unit.worker_class, "save_memory") and wanted not in self._savers:
            _logger.warning("%s and units like it save memory in this process from now on", unit.name)
            self._savers.append(wanted)
            self._made_of = None
        if self._worker is None or self._made_of != wanted:
            # Two models must not be in memory at once. A constructor that fails leaves no other worker behind.
            self._worker = self._made_of = None
            if not getattr(unit.worker_class, "BESIDE_KEPT_PIPELINE", False):
                let_go()
            release_memory()
            with _progress_meanwhile(progress):
                self._worker = unit.worker_class(unit.settings)
            if self._saves(unit):
                self._worker.save_memory()
            self._made_of = wanted
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead.worker_class, ahead.settings) == wanted:
            self._worker.prepare(ahead.payload, UnitStore(ahead.address))
        return self._worker


@contextlib.contextmanager
def _progress_meanwhile(progress: Progress) -> Iterator[None]:
    """Reports progress while a worker is constructed, for `LOADING_S` at most: reading a model from a slow disk may take longer
    than a unit may be silent. Fetching it from the Hub does not count."""
    done = threading.Event()

    def report() -> None:
        left = LOADING_S
        while left > 0 and not done.wait(_REPORT_INTERVAL_S):
            if not is_fetching():
                left -= _REPORT_INTERVAL_S
            progress(0, 1)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    progress(0, 1)
