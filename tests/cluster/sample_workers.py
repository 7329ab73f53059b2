"""Workers that misbehave on request. A payload is `(what, *arguments)`; marks left in files count the attempts."""

import ctypes
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Unpicklable:
    """A result that cannot leave its process."""

    def __reduce__(self) -> str:
        raise TypeError("this result stays here")


@dataclass(frozen=True)
class Settings:
    """What the sample workers are made with."""

    marks: Path
    """Folder for one file per attempt, `<unit>.<pid>.<time>`, and `start.<pid>` per worker constructed."""
    fail_start: str = ""
    """"value": the constructor raises ValueError; "runtime": RuntimeError; "once": RuntimeError the first time;
    "hang": it does not return."""


class SampleWorker:
    """Does what the payload says."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.thread = threading.get_ident()
        self.saves_memory = False
        starts = len(list(settings.marks.glob("start.*")))
        (settings.marks / f"start.{os.getpid()}").touch()
        if settings.fail_start == "value":
            raise ValueError("no such model: nowhere/nothing")
        if settings.fail_start == "runtime" or (settings.fail_start == "once" and starts == 0):
            raise RuntimeError(f"start {starts} fails")
        if settings.fail_start == "hang":
            time.sleep(600)

    def run(self, unit: tuple[Any, ...], progress: Callable[[int, int], None], /) -> Any:
        """Do `unit`."""
        assert threading.get_ident() == self.thread
        what, *arguments = unit
        return getattr(self, f"do_{what}")(progress, *arguments)

    def save_memory(self) -> None:
        """Note it."""
        self.saves_memory = True

    def mark(self, name: str) -> int:
        """Note an attempt at `name`; return how many there were before."""
        before = len(list(self.settings.marks.glob(f"{name}.*")))
        (self.settings.marks / f"{name}.{os.getpid()}.{time.monotonic_ns()}").touch()
        return before

    def do_double(self, progress: Callable[[int, int], None], name: str, value: int) -> int:
        """Succeed."""
        self.mark(name)
        return 2 * value

    def do_meet(self, progress: Callable[[int, int], None], name: str, num_workers: int, where: str = "start") -> int:
        """Wait until so many workers are there; where `where` is the start of units' names: until so many have had such one."""
        self.mark(name)
        step = 0
        while len({path.name.split(".")[1] for path in self.settings.marks.glob(f"{where}*.*")}) < num_workers:
            step += 1
            progress(step, step + 1)
            time.sleep(0.01)
        return num_workers

    def do_steps(self, progress: Callable[[int, int], None], num_steps: int, step_s: float) -> int:
        """Take a while, and say so; note in the file `silence` the longest time between two reports: on a busy machine more."""
        told, silence = time.monotonic(), 0.0
        for step in range(num_steps + 1):
            silence, told = max(silence, time.monotonic() - told), time.monotonic()
            progress(step, num_steps)
            if step < num_steps:
                time.sleep(step_s)
        with (self.settings.marks / "silence").open("a") as file:
            file.write(f"{silence}\n")
        return num_steps

    def do_exit(self, progress: Callable[[int, int], None], name: str) -> None:
        """Take the whole process down, with a last word."""
        self.mark(name)
        sys.stderr.write("the last word of " + name + "\n")
        sys.stderr.flush()
        os._exit(1)

    def do_die(self, progress: Callable[[int, int], None], name: str, how: str) -> None:
        """Die in the middle of a progress bar."""
        self.mark(name)
        sys.stderr.write("\rLoading pipeline components...:  57%|#####7    | 4/7 [00:00<00:00, 11.99it/s]")
        sys.stderr.write("\rLoading pipeline components...: 100%|##########| 7/7 [00:00<00:00, 11.99it/s]")
        sys.stderr.flush()
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "crash":
            os.abort()
        sys.exit(3)

    def do_fill_the_disk(self, progress: Callable[[int, int], None], name: str) -> None:
        """Meet a full disk, and say more of it."""
        self.mark(name)
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
        except OSError as error:
            raise RuntimeError(f"{name} could not be written:\nno room") from error

    def do_raise(self, progress: Callable[[int, int], None], name: str, kind: str) -> None:
        """Raise an exception."""
        self.mark(name)
        raise {"value": ValueError, "runtime": RuntimeError, "os": OSError}[kind](f"bad luck in {name}")

    def do_raise_anew(self, progress: Callable[[int, int], None], name: str) -> None:
        """Raise an exception that says something else at every attempt."""
        raise RuntimeError(f"attempt {self.mark(name)}")

    def do_too_much(self, progress: Callable[[int, int], None], name: str) -> None:
        """Ask for more memory than any machine has."""
        self.mark(name)
        bytearray(2**60)

    def do_lean(self, progress: Callable[[int, int], None], name: str) -> bool:
        """Ask for too much until told to save memory; say so."""
        self.mark(name)
        if not self.saves_memory:
            bytearray(2**60)
        return self.saves_memory

    def do_unpicklable(self, progress: Callable[[int, int], None]) -> Unpicklable:
        """Return what cannot be sent."""
        return Unpicklable()

    def do_stall_first(self, progress: Callable[[int, int], None], name: str, how: str) -> int:
        """Stop working in the first attempt; say the number of attempts in the next."""
        before = self.mark(name)
        progress(1, 2)
        if before == 0:
            if how == "holding the GIL":
                ctypes.PyDLL(None).sleep(600)
            elif how == "SIGSTOP":
                os.kill(os.getpid(), signal.SIGSTOP)  # another thread may take it, and this one go on for a moment
            time.sleep(600)
        return before + 1

    def do_wait(self, progress: Callable[[int, int], None], name: str) -> int:
        """Wait for the file `go`, with progress all the while; say the number of attempts."""
        before = self.mark(name)
        step = 0
        while not (self.settings.marks / "go").exists():
            step += 1
            progress(step, step + 1)
            time.sleep(0.01)
        return before + 1

    def do_environment(self, progress: Callable[[int, int], None]) -> dict[str, str]:
        """The process's environment."""
        return dict(os.environ)

    def do_print(self, progress: Callable[[int, int], None]) -> None:
        """Make noise."""
        os.write(1, b"noise on standard output\n")
        os.write(2, b"noise on standard error\n")


class PreparingSample(SampleWorker):
    """Notes what it is to prepare; says of a unit whether it has prepared it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.prepared: set[str] = set()

    def prepare(self, unit: tuple[Any, ...]) -> None:
        """Note it."""
        self.prepared.add(unit[1])

    def do_prepared(self, progress: Callable[[int, int], None], name: str) -> bool:
        """Take a while."""
        time.sleep(0.05)
        return name in self.prepared
