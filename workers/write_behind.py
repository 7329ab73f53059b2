"""Writes in a thread beside the computation that makes what is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class WriteBehind:
    """One thread that writes in order. At most two writes are held: one at work, and one that waits for it.

    At the end of ``with`` everything is written, or the error of the first write that failed is raised; an error of the
    computation itself comes first.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._pending: list[Future[None]] = []
        self.waited_s = 0.0
        """Seconds for which the computation has waited for writes."""

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._wait(at_most=0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def put(self, write: Callable[[], None]) -> None:
        """Have ``write`` called after those before it; waits while two are held.

        Raises:
            Exception: an earlier write's error.
        """
        self._wait(at_most=1)
        self._pending.append(self._pool.submit(write))

    def _wait(self, *, at_most: int) -> None:
        began = time.perf_counter()
        while self._pending and (len(self._pending) > at_most or self._pending[0].done()):
            self._pending.pop(0).result()
        self.waited_s += time.perf_counter() - began
