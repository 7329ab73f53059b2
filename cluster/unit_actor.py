"""What runs inside a worker's process: a plain worker object, and a second thread that answers how far it is.

| thread (concurrency group) | methods | for |
|---|---|---|
| default: always one and the same thread | `locate`, `load`, `run` | everything of the worker: its constructor and its units |
| `pulse` | `pulse`, `stack` | the driver, while the other thread is busy |

`pulse` answering proves that the process lives; only a changed count proves that the work goes on.
"""

import errno
import gc
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Worker(Protocol):
    """The protocol of a worker class: plain Python, no Ray."""

    def __init__(self, settings: Any) -> None:
        """Load what all units need, once per process."""

    def run(self, unit: Any, progress: Callable[[int, int], None], /) -> Any:
        """Do one unit (`Unit.payload`) and return a small picklable result.

        Call `progress(done, total)` at every step: silence for longer than the pool's limit counts as death.
        """


class PreparingWorker(Worker, Protocol):
    """The protocol of a worker class whose units may be `Unit.prepared`."""

    def prepare(self, unit: Any, /) -> None:
        """Note that `unit` probably follows the one that `run` gets next, and begin early with what it needs: in a thread, and
        such that nothing depends on it. It may never come, or come in another process."""


class LeanWorker(Worker, Protocol):
    """The protocol of a worker class that can do a unit with less memory and the same result."""

    def save_memory(self) -> None:
        """Give back what is not needed. The next unit, which has run out of memory in this process or another, and all units
        like it are to be done with less."""


class ReplicaWorker(Worker, Protocol):
    """The protocol of a worker class whose ranks hold something together. It finds its place as a program started by
    `torchrun` does: in the environment variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. In rank 0
    MASTER_LISTEN_FD is the descriptor of the socket that listens there already."""

    def shadow(self, unit: Any, progress: Callable[[int, int], None], /) -> None:
        """Take part in rank 0's unit where there is none left for this rank: do what the others wait for, and write nothing."""


@dataclass(frozen=True)
class Location:
    """Where an actor's process is."""

    node_id: str
    pid: int
    address: str
    """Of its node."""
    port: int | None
    """Where the process listens for the ranks of its replica; None where it was not asked to."""


@dataclass(frozen=True)
class Membership:
    """A rank's place in its replica."""

    rank: int
    world_size: int
    address: str
    """Of rank 0's node."""
    port: int
    """Where rank 0 listens."""

    def environment(self) -> dict[str, str]:
        """As `torchrun` tells it. Ray shows every process its own GPU alone, so the local rank is 0."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True)
class Pulse:
    """How far an actor is. `count` changes whenever the worker calls `progress`."""

    serial: int
    count: int
    done: int
    total: int


@dataclass(frozen=True)
class Outcome:
    """How a call into the worker's own code ended."""

    result: Any
    """What the worker returned; None after an error."""
    error: str | None
    """When the worker raised: the exception in one line, and below it the traceback."""
    retryable: bool
    """False where another attempt at once gives the same error: after a ValueError, and where a disk is full."""
    environmental: bool
    """The worker raised an OSError: the same error again may be the machine's, and pass."""
    out_of_memory: bool
    """The worker raised a MemoryError."""
    saved_memory: bool
    """It says so (attribute `saved_memory`): it did the unit as `LeanWorker.save_memory` asks for, without having been told."""
    seconds: float
    pulse: Pulse


class UnitActor:
    """Holds one worker. The driver applies `ray.remote` and calls it; every answer is one of the classes above."""

    def __init__(self) -> None:
        gc.disable()  # until the worker's modules are there, which the arguments of `load` bring
        self._worker: Any = None
        self._pulse = Pulse(serial=-1, count=0, done=0, total=0)
        self._work_thread = threading.get_ident()
        self._listening: socket.socket | None = None

    def locate(self, *, listen: bool) -> Location:
        """Say where this process is; the first call, so its answer also says that the actor has a place.

        Args:
            listen: the ranks of a replica are to meet here. From now on the port is this process's: nobody else can take it
                before the worker answers there, which is a model's loading later.
        """
        address, port = ray.util.get_node_ip_address(), None
        if listen:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self._listening = socket.create_server((address, 0), family=family)
            port = self._listening.getsockname()[1]
        return Location(ray.get_runtime_context().get_node_id(), os.getpid(), address, port)

    def load(self, worker_class: type[Worker], settings: Any, membership: Membership | None) -> Outcome:
        """Construct the worker, in place of the one before."""
        if not gc.isenabled():
            _spare_imported_objects()
        if membership is not None:
            os.environ.update(membership.environment())
        if self._listening is not None:
            os.environ["MASTER_LISTEN_FD"] = str(self._listening.detach())  # the worker's from here on
            self._listening = None

        def construct() -> None:
            self._worker = None
            gc.collect()
            self._worker = worker_class(settings)

        return self._call(-1, construct)

    def run(self, serial: int, payload: Any, *, shadow: bool, ahead: Any = None, lean: bool = False) -> Outcome:
        """Do one unit, or shadow it.

        Args:
            serial: tells its pulses from those of the unit before.
            ahead: to be prepared.
            lean: the unit has run out of memory before.
        """

        def do() -> Any:
            if lean and hasattr(self._worker, "save_memory"):
                self._worker.save_memory()
            if ahead is not None:
                self._worker.prepare(ahead)
            return (self._worker.shadow if shadow else self._worker.run)(payload, self._report)

        return self._call(serial, do)

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> Pulse:
        """How far the work is."""
        return self._pulse

    @ray.method(concurrency_group="pulse")
    def stack(self) -> str:
        """What the work thread is doing now."""
        frame = sys._current_frames().get(self._work_thread)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def _report(self, done: int, total: int) -> None:
        self._pulse = Pulse(self._pulse.serial, self._pulse.count + 1, done, total)

    def _call(self, serial: int, function: Callable[[], Any]) -> Outcome:
        self._work_thread = threading.get_ident()
        self._pulse = Pulse(serial=serial, count=0, done=0, total=0)
        result, error, retryable, environmental, out_of_memory, saved_memory = None, None, True, False, False, False
        start = time.perf_counter()
        try:
            result = function()
        except Exception as exception:  # noqa: BLE001 - each belongs to the unit and is reported with its traceback
            summary = " ".join(f"{type(exception).__name__}: {exception}".split())
            error, retryable = f"{summary}\n{traceback.format_exc()}", not _is_final(exception)
            environmental = isinstance(exception, OSError)
            out_of_memory, saved_memory = isinstance(exception, MemoryError), getattr(exception, "saved_memory", False)
        seconds = time.perf_counter() - start
        return Outcome(result, error, retryable, environmental, out_of_memory, saved_memory, seconds, self._pulse)


def _spare_imported_objects() -> None:
    """Have the garbage collector begin, and pass over all objects of now: the worker's modules are half a million that live as
    long as the process, and looking through them takes 0.25 s, at every change of stage."""
    gc.freeze()
    gc.enable()


def _is_final(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, is the same at the next attempt."""
    if isinstance(error, ValueError):
        return True
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            return True
        error = error.__cause__
    return False
