"""Reads arrays in a thread before they are needed, as many as memory is set apart for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import psutil
from torch import Tensor

_logger = logging.getLogger(__name__)

MAX_FRAC = 0.25
"""Of the memory that is available when reading begins, for what is read ahead."""


class ReadAhead:
    """Arrays by name, some of them read already.

    Args:
        read: reads one array; also called in a thread, while others are read.
        limit_bytes: of what is held ahead of need; None for `MAX_FRAC` of the memory that is available at the time.
    """

    def __init__(self, read: Callable[[str], Tensor], *, limit_bytes: int | None = None) -> None:
        self._read, self._limit_bytes = read, limit_bytes
        self._arrays: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self.num_ahead = 0
        """Arrays that were there when they were asked for."""

    def begin(self, names: Sequence[str]) -> None:
        """Begin to read these, in order, and forget others."""
        self.stop()
        self._arrays = {name: array for name, array in self._arrays.items() if name in names}
        limit = self._limit_bytes
        if limit is None:
            limit = int(MAX_FRAC * psutil.virtual_memory().available)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(names, limit, self._stopped), daemon=True)
        self._thread.start()

    def take(self, name: str) -> Tensor:
        """The array; read now if it is not there.

        Raises:
            what `read` raises, here and never in the thread.
        """
        array = self._arrays.pop(name, None)
        if array is None:
            return self._read(name)
        self.num_ahead += 1
        return array

    def stop(self) -> None:
        """End reading ahead, after the array at hand; what has been read is kept."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def _fill(self, names: Sequence[str], limit_bytes: int, stopped: threading.Event) -> None:
        held = sum(array.nbytes for array in self._arrays.values())
        for name in names:
            if name in self._arrays:
                continue
            if stopped.is_set() or held >= limit_bytes:
                return
            try:
                array = self._read(name)
            except (OSError, ValueError) as error:  # who takes it will see the same, and report it
                _logger.debug("%s was not read ahead: %s", name, error)
                return
            held += array.nbytes
            if held > limit_bytes:
                return
            self._arrays[name] = array
