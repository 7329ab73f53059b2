"""One driver per run in a bucket, without comparing clocks.

::

    run.lock   {owner, epoch, beat, who it is}, written with conditional puts only

    driver     creates it, or takes over a free one  -> epoch + 1
               replaces it every period (beat + 1)   -> refused once: somebody has taken over, and this driver stops
               leaves it without an owner at its end
    contender  refused as soon as it sees a beat; takes over when the owner is provably gone (a process of this machine that
               is dead), or when it has itself watched one and the same e_tag for six periods on its own clock

A lease is not mutual exclusion: a driver that was stopped for long may still write. What it writes does no harm: outputs have
the same bytes whoever writes them, and a record carries its driver's epoch, over which no older driver's can be written
(:meth:`storage.run_store.RunStore.put_record`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from storage.run_store import Driver, LeaseLost, RunLocked, StoreUnreachable
from storage.s3_requests import Requests, seconds_from_environment

_logger = logging.getLogger(__name__)

_INTERRUPT = signal.SIGUSR1
"""What a driver that has lost its lease sends its own main thread."""
_PERIODS = 6
"""Of silence, watched by a contender, until it takes over."""


@dataclass(frozen=True)
class _Lock:
    """Content of the lock object."""

    owner: str | None
    """Random; None: free."""
    epoch: int
    beat: int
    host: str
    pid: int
    started: str
    """For people."""
    machine: str
    """Boot and process namespace: processes of equal ones see each other."""
    ticks: int
    """When the process was started, on that machine's own count: a process id may be used again."""

    @classmethod
    def mine(cls, epoch: int) -> _Lock:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(
            secrets.token_hex(16), epoch, 0, socket.gethostname(), pid, started, _this_machine(), _start_ticks(pid) or 0
        )

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} (since {self.started})"

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @property
    def provably_gone(self) -> bool:
        return self.machine == _this_machine() and _start_ticks(self.pid) != self.ticks


class S3Lease:
    """The lock object ``key`` of a run."""

    def __init__(self, requests: Requests, key: str) -> None:
        self._requests, self._key = requests, key
        self._period_s = seconds_from_environment("REELQUANT_LEASE_PERIOD_S", 10.0)
        self._writing = threading.Lock()
        self._held: tuple[_Lock, str] | None = None
        self._lost: Exception | None = None
        """Why the lease is no longer this process's."""

    @property
    def epoch(self) -> int:
        """Of the lease that this process holds; 0 without one."""
        held = self._held
        return held[0].epoch if held else 0

    def check(self) -> None:
        """Raises LeaseLost if this process had the lease and has lost it."""
        if isinstance(self._lost, FileExistsError):
            raise LeaseLost(
                f"{self._requests.url} was taken over by another driver while this one did not reach the store: leave the run "
                "to it, or stop it and run the same command again"
            ) from self._lost
        if self._lost is not None:
            raise LeaseLost(
                f"the lease of {self._requests.url} could not be renewed, so that another driver may take the run over: "
                f"{self._lost}; then run the same command again"
            ) from self._lost

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the only driver. Raises RunLocked; LeaseLost from the body once the lease is no longer
        this process's: another driver has taken over, or the store refuses to renew it."""
        self._lost = None
        self._held = self._acquire()
        ended = threading.Event()
        interrupts = threading.current_thread() is threading.main_thread()
        # Not Ctrl-C's signal: that is ignored by what a script starts in the background.
        before = signal.signal(_INTERRUPT, signal.default_int_handler) if interrupts else None
        beats = threading.Thread(target=self._beat, args=(ended, interrupts), name="lease", daemon=True)
        beats.start()
        try:
            self._require_conditions()
            yield
        except (KeyboardInterrupt, OSError):  # an OSError where the loss showed itself in this thread first
            self.check()
            raise
        finally:
            ended.set()
            self._release()
            beats.join()
            if interrupts:
                signal.signal(_INTERRUPT, before)

    def driver(self) -> Driver:
        """Who drives the run: waits up to two periods for a sign of life from another machine."""
        found = self._read()
        if found is None or found[0].owner is None:
            return Driver(None, None)
        if found[0].provably_gone:
            return Driver(None, str(found[0]))
        changed = self._watch(found, 2)
        if changed is not None:
            return Driver(str(changed[0]) if changed[0].owner else None, None)
        return Driver(None, f"{found[0]}, silent for {2 * self._period_s:g} s")

    def _acquire(self) -> tuple[_Lock, str]:
        mine = _Lock.mine(1)
        while True:
            try:
                return mine, self._requests.create(self._key, mine.encode())
            except FileExistsError:
                found = self._read()
            if found is not None:
                break
        lock, e_tag = found
        if lock.owner is not None and not lock.provably_gone:
            changed = self._watch(found, _PERIODS)
            if changed is not None and changed[0].owner is not None:
                raise self._locked(changed[0])
            lock, e_tag = changed or found
        mine = _Lock.mine(lock.epoch + 1)
        try:
            return mine, self._requests.replace(self._key, mine.encode(), e_tag=e_tag)
        except FileExistsError:
            faster = self._read()
            raise self._locked(faster[0] if faster else lock) from None

    def _locked(self, lock: _Lock) -> RunLocked:
        return RunLocked(
            f"{self._requests.url} is in use by {lock}: wait for it, stop it, or use another run directory (a driver that was "
            f"killed is replaced after {_PERIODS * self._period_s:g} s of silence, on its own machine at once)"
        )

    def _watch(self, found: tuple[_Lock, str], periods: int) -> tuple[_Lock, str] | None:
        """The lock as soon as it changes; None if it stays for so many periods in which the store answered."""
        silent_s, last = 0.0, time.monotonic()
        while silent_s < periods * self._period_s:
            time.sleep(self._period_s / 5)
            now_found = self._read()
            if now_found is None or now_found[1] != found[1]:
                return now_found or (replace(found[0], owner=None), found[1])
            now = time.monotonic()
            # While the store is away the owner cannot show that it lives.
            if now - last < self._period_s:
                silent_s += now - last
            else:
                silent_s = 0.0
            last = now
        return None

    def _beat(self, ended: threading.Event, interrupts: bool) -> None:
        while not ended.wait(self._period_s):
            with self._writing:
                if ended.is_set() or self._held is None:
                    return
                lock, e_tag = self._held
                lock = replace(lock, beat=lock.beat + 1)
                try:
                    self._held = lock, self._requests.replace(self._key, lock.encode(), e_tag=e_tag)
                except StoreUnreachable as error:  # nobody else reaches it either
                    _logger.warning("%s", error)
                except Exception as error:  # noqa: BLE001 - whatever it is, nobody renews the lease from here on
                    self._lost = error
            if self._lost is not None:
                if interrupts:
                    signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT)
                return

    def _release(self) -> None:
        """Leaves the lock without an owner, so that the epoch goes on counting."""
        with self._writing:
            held, self._held = self._held, None
            if held is None or self._lost is not None:
                return
            free = replace(held[0], owner=None, beat=held[0].beat + 1)
            try:
                self._requests.replace(self._key, free.encode(), e_tag=held[1])
            except (OSError, ValueError) as error:
                _logger.warning("the lease of %s was not given back: %s", self._requests.url, error)

    def _require_conditions(self) -> None:
        """Some stores take conditional puts and ignore the condition: two drivers would both believe to be alone."""
        with self._writing:
            assert self._held is not None
            lock, e_tag = self._held
            stale = '"00000000000000000000000000000000"'
            if not all(self._requests.refuses(self._key, lock.encode(), e_tag=tag) for tag in (None, stale)):
                raise ValueError(
                    f"{self._requests.url}: this store ignores the conditions If-None-Match and If-Match of a put, so that "
                    "it cannot keep two drivers apart: use one that has them (AWS S3, MinIO), or a shared file system"
                )
            self._held = lock, e_tag

    def _read(self) -> tuple[_Lock, str] | None:
        try:
            data, e_tag = self._requests.get(self._key)
        except FileNotFoundError:
            return None
        try:
            return _Lock(**json.loads(data)), e_tag
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self._requests.url}/{self._key} is not a lease ({error}): make sure that no driver is at work, remove it, "
                "and run again"
            ) from error


def _this_machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_ticks(pid: int) -> int | None:
    """When a process of this machine was started; None for a dead one."""
    try:
        # After the name, which may hold anything: state is the first field, the start time the twentieth.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
