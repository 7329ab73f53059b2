"""Reads arrays in a thread before they are needed, as many as memory is set apart for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import psutil
from torch import Tensor

from storage.recorded_outputs import RecordedOutputs

_logger = logging.getLogger(__name__)

MAX_FRAC = 0.25
"""Of the memory that is available when reading begins, for what is read ahead."""


class ReadAhead:
    """Arrays of units' inputs, some of them read already; told apart by what they are, as units of several runs have the same
    names.

    Args:
        limit_bytes: of what is held ahead of need; None for `MAX_FRAC` of the memory that is available at the time.
    """

    def __init__(self, *, limit_bytes: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._arrays: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self.num_ahead = 0
        """Arrays that were there when they were asked for."""

    def begin(self, store: RecordedOutputs, names: Sequence[str]) -> None:
        """Begin to read these, in order, and forget others."""
        self.stop()
        try:
            wanted = {store.identity(name): name for name in names}
        except (OSError, ValueError) as error:  # who takes them will see the same, and report it
            _logger.debug("nothing is read ahead: %s", error)
            wanted = {}
        self._arrays = {key: array for key, array in self._arrays.items() if key in wanted}
        limit = self._limit_bytes
        if limit is None:
            limit = int(MAX_FRAC * psutil.virtual_memory().available)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(store, wanted, limit, self._stopped), daemon=True)
        self._thread.start()

    def forget(self) -> None:
        """Read nothing ahead, and forget what was read."""
        self.stop()
        self._arrays = {}

    def take(self, store: RecordedOutputs, name: str) -> Tensor:
        """The array; read now if it is not there. Raises what `store.read` raises, here and never in the thread."""
        array = self._arrays.pop(store.identity(name), None)
        if array is None:
            return store.read(name)
        self.num_ahead += 1
        return array

    def stop(self) -> None:
        """End reading ahead, after the array at hand; what has been read is kept."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def _fill(
        self, store: RecordedOutputs, wanted: Mapping[str, str], limit_bytes: int, stopped: threading.Event
    ) -> None:
        held = sum(array.nbytes for array in self._arrays.values())
        for key, name in wanted.items():
            if key in self._arrays:
                continue
            if stopped.is_set() or held >= limit_bytes:
                return
            try:
                array = store.read(name)
            except (OSError, ValueError) as error:  # who takes it will see the same, and report it
                _logger.debug("%s was not read ahead: %s", name, error)
                return
            held += array.nbytes
            if held > limit_bytes:
                return
            self._arrays[key] = array
