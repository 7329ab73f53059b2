"""One process for the units of all stages and runs: it becomes the worker that the next unit asks for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from workers.messages import Progress, UnitOutput
from workers.process import release_memory
from workers.usage import measured

LOADING_S = 1800.0
"""So long the construction of a worker may take before its silence counts."""
_REPORT_INTERVAL_S = 1.0


@dataclass(frozen=True)
class SharedUnit:
    """A unit, and the worker that does it."""

    worker_class: type[Any]
    settings: Any
    payload: Any


class SharedWorker:
    """Has no settings of its own; its units carry everything.

    The worker of the last unit is kept as long as class and settings are equal, with what it has opened: hand out units of
    equal ones one after the other.
    """

    def __init__(self, settings: None) -> None:
        self._made_of: tuple[type[Any], Any] | None = None
        self._worker: Any = None
        self._ahead: SharedUnit | None = None

    def prepare(self, unit: SharedUnit) -> None:
        """Has the worker of the next unit prepare this one, if it is the worker of both."""
        self._ahead = unit

    def run(self, unit: SharedUnit, progress: Progress) -> UnitOutput:
        """Does the unit as a worker of its own would."""
        began = time.perf_counter()
        worker = self._worker_of(unit, progress)
        with measured(load_s=time.perf_counter() - began) as meter:
            output: UnitOutput = worker.run(unit.payload, progress)
            return replace(output, usage=meter.usage())

    def shadow(self, unit: SharedUnit, progress: Progress) -> None:
        """Takes part in a replica's unit as a worker of its own would."""
        self._worker_of(unit, progress).shadow(unit.payload, progress)

    def _worker_of(self, unit: SharedUnit, progress: Progress) -> Any:
        wanted = (unit.worker_class, unit.settings)
        if self._worker is None or self._made_of != wanted:
            # Two models must not be in memory at once. A constructor that fails leaves no other worker behind.
            self._worker = self._made_of = None
            release_memory()
            with _progress_meanwhile(progress):
                self._worker = unit.worker_class(unit.settings)
            self._made_of = wanted
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead.worker_class, ahead.settings) == wanted:
            self._worker.prepare(ahead.payload)
        return self._worker


@contextlib.contextmanager
def _progress_meanwhile(progress: Progress) -> Iterator[None]:
    """Reports progress while a worker is constructed, for `LOADING_S` at most: reading a model from a slow disk may take longer
    than a unit may be silent."""
    done = threading.Event()
    deadline = time.monotonic() + LOADING_S

    def report() -> None:
        while time.monotonic() < deadline and not done.wait(_REPORT_INTERVAL_S):
            progress(0, 1)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    progress(0, 1)
