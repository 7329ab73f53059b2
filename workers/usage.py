"""What a unit takes of its process and of its node: CPU, GPU, bytes read and written, disk and network."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch

SAMPLE_INTERVAL_S = 0.5
"""Between two looks at the GPU."""


@dataclass(frozen=True)
class Usage:
    """Over one unit, without the construction of its worker."""

    seconds: float
    load_s: float
    """Of the construction, if the worker was made for this unit."""
    cpu_s: float
    """Of all threads of the process, user and system."""
    gpu_s: float | None
    """Time with a kernel on the GPU, from samples of its utilization; None without a GPU or its management library."""
    read_bytes: int
    """By the process's read calls, from disk, cache or network; memory-mapped weights are not among them."""
    written_bytes: int
    """By the process's write calls."""
    disk_s: float | None
    """Time in which the node's busiest disk was at work, for whomever; None where the system does not say."""
    network_bytes: int | None
    """Received and sent by the node, for whomever, without its loopback device; None where the system does not say."""


@dataclass(frozen=True)
class _Counters:
    at_s: float
    cpu_s: float
    read_bytes: int
    written_bytes: int
    disks: dict[str, float] | None
    network_bytes: int | None

    @classmethod
    def now(cls) -> _Counters:
        process = psutil.Process()
        cpu = process.cpu_times()
        # Not every system has both, and a container may hide them.
        read = written = 0
        with contextlib.suppress(psutil.Error, AttributeError, OSError):
            counters = process.io_counters()
            read, written = counters.read_chars, counters.write_chars
        return cls(time.perf_counter(), cpu.user + cpu.system, read, written, _disk_seconds(), _network_bytes())


class UsageMeter:
    """Measures from its creation on, until `usage`."""

    def __init__(self, *, load_s: float = 0.0) -> None:
        self._load_s = load_s
        self._gpu: list[float] = []
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if (utilization := _gpu_utilization()) is not None:
            self._thread = threading.Thread(target=self._sample, args=(utilization,), daemon=True)
            self._thread.start()
        self._before = _Counters.now()

    def usage(self) -> Usage:
        """What was used since."""
        before, after = self._before, _Counters.now()
        seconds = after.at_s - before.at_s
        disks = None
        if before.disks is not None and after.disks is not None:
            spent = [busy - before.disks.get(name, busy) for name, busy in after.disks.items()]
            disks = min(seconds, max(spent, default=0.0))
        network = None
        if before.network_bytes is not None and after.network_bytes is not None:
            network = max(0, after.network_bytes - before.network_bytes)
        return Usage(
            round(seconds, 3),
            round(self._load_s, 3),
            round(after.cpu_s - before.cpu_s, 3),
            round(seconds * sum(self._gpu) / len(self._gpu), 3) if self._gpu else None,
            after.read_bytes - before.read_bytes,
            after.written_bytes - before.written_bytes,
            None if disks is None else round(disks, 3),
            network,
        )

    def close(self) -> None:
        """End the sampling of the GPU."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self, utilization: Callable[[], float]) -> None:
        while not self._done.is_set():
            self._gpu.append(utilization())
            self._done.wait(SAMPLE_INTERVAL_S)


@contextlib.contextmanager
def measured(*, load_s: float = 0.0) -> Iterator[UsageMeter]:
    """A meter of what is done inside."""
    meter = UsageMeter(load_s=load_s)
    try:
        yield meter
    finally:
        meter.close()


def _gpu_utilization() -> Callable[[], float] | None:
    """Reads the share of time with a kernel on this process's GPU in the last moment, 0 to 1."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None

    def read() -> float:
        return torch.cuda.utilization() / 100

    try:
        read()
    except (ModuleNotFoundError, RuntimeError):  # no NVML, or one that may not be asked
        return None
    return read


def _disk_seconds() -> dict[str, float] | None:
    try:
        counters = psutil.disk_io_counters(perdisk=True)
        return {name: disk.busy_time / 1000 for name, disk in counters.items()} if counters else None
    except (AttributeError, OSError, RuntimeError):
        return None


def _network_bytes() -> int | None:
    try:
        counters = psutil.net_io_counters(pernic=True)
    except OSError:
        return None
    return sum(int(nic.bytes_recv) + int(nic.bytes_sent) for name, nic in counters.items() if name != "lo")
