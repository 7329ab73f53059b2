"""One process for the units of many runs: it becomes the worker of whichever run the next unit belongs to."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

from workers.messages import Progress, UnitOutput


@dataclass(frozen=True)
class SharedUnit:
    """A unit, and the settings of its own run's workers."""

    settings: Any
    payload: Any


class SharedWorker:
    """Its settings are a worker class of this package; its units carry the rest.

    The worker of the last unit is kept as long as the settings are equal, with what it has opened: hand out units of equal
    settings one after the other.
    """

    def __init__(self, worker_class: type[Any]) -> None:
        self._class = worker_class
        self._settings: Any = None
        self._worker: Any = None

    def run(self, unit: SharedUnit, progress: Progress) -> UnitOutput:
        """Does the unit as its own run's worker would."""
        output: UnitOutput = self._worker_of(unit, progress).run(unit.payload, progress)
        return output

    def shadow(self, unit: SharedUnit, progress: Progress) -> None:
        """Takes part in a replica's unit as its own run's worker would."""
        self._worker_of(unit, progress).shadow(unit.payload, progress)

    def _worker_of(self, unit: SharedUnit, progress: Progress) -> Any:
        if self._worker is None or self._settings != unit.settings:
            # Two models must not be in memory at once. A constructor that fails leaves no worker of other settings behind.
            self._worker = self._settings = None
            gc.collect()
            self._worker = self._class(unit.settings)
            self._settings = unit.settings
            progress(0, 1)
        return self._worker
