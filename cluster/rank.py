"""One actor of a slot: where it is, what it was asked, how far it is, and its end. What to do about errors the pool decides."""

import logging
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.session import Session
from cluster.ticket_queue import Ticket
from cluster.unit_actor import Location, Pulse

_logger = logging.getLogger(__name__)

_LEAVE_TIMEOUT_S = 0.5  # an actor that is neither frozen nor dying leaves within 0.1 s
_GONE_TIMEOUT_S = 10.0


class Rank:
    """An actor and the driver's view of it."""

    def __init__(self, name: str, actor: Any, session: Session) -> None:
        self.name = name
        self.actor = actor
        self.ticket: Ticket | None = None
        """The unit that it does, or shadows."""
        self.is_shadow = False
        self.call: Any = None
        """Reference to the answer being waited for: place, load or run."""
        self.pulse_call: Any = None
        """Reference to the pulse being waited for."""
        self.pulse_asked_at = 0.0
        """When it was asked for. Monotonic seconds of the driver."""
        self.pulse_waited_s = 0.0
        """For how long the pool has waited for it."""
        self.changed_at = 0.0
        """When the actor last showed life: an answer, or progress. Monotonic seconds of the driver."""
        self.location: Location | None = None
        self._session = session
        self._birth: str | None = None
        self._pulse: Pulse | None = None
        self._next_pulse_at = 0.0

    def ask(self, call: Any) -> None:
        """Wait for the answer to a call."""
        self.call = call
        self.changed_at = time.monotonic()

    def take_place(self, location: Location) -> None:
        """The actor is there."""
        self.location = location
        is_here = location.node_id == ray.get_runtime_context().get_node_id()
        self._birth = _birth_of(location.pid) if is_here else None
        self.call = None

    def assign(self, ticket: Ticket, *, shadow: bool = False, following: Ticket | None = None) -> None:
        """Give the idle actor a unit, or another rank's unit to shadow; and what will probably follow, to prepare it."""
        self.ticket, self.is_shadow = ticket, shadow
        self._pulse = None
        self._next_pulse_at = 0.0
        ahead = None if following is None else following.payload
        self.ask(self.actor.run.remote(ticket.serial, ticket.payload, shadow=shadow, ahead=ahead, lean=ticket.lean))

    def rest(self) -> None:
        """The actor has answered."""
        self.ticket, self.is_shadow, self.call = None, False, None
        self.changed_at = time.monotonic()

    def ask_pulse(self, interval_s: float) -> None:
        """Ask a busy actor for its pulse, every `interval_s` and one question at a time."""
        now = time.monotonic()
        if self.ticket is None or self.pulse_call is not None:
            return
        if self._next_pulse_at == 0.0:  # short units are never asked
            self._next_pulse_at = self.changed_at + interval_s
        if now >= self._next_pulse_at:
            self._next_pulse_at = now + interval_s
            self.pulse_asked_at, self.pulse_waited_s = now, 0.0
            self.pulse_call = self.actor.pulse.remote()

    def see(self, pulse: Pulse) -> bool:
        """Take note of a pulse; True when it shows progress that was not known."""
        if self.ticket is None or pulse.serial != self.ticket.serial or pulse.count == 0:
            return False
        if self._pulse is not None and pulse.count <= self._pulse.count:
            return False
        self._pulse = pulse
        self.changed_at = time.monotonic()
        return True

    def stack(self) -> str:
        """What the actor's work thread is doing; a remark when the process does not answer within 1 s."""
        try:
            return str(ray.get(self.actor.stack.remote(), timeout=1.0))
        except (GetTimeoutError, RayError) as error:
            return f"(the process does not answer: {type(error).__name__})\n"

    def last_words(self) -> str:
        """The end of what the actor's process wrote to its standard error, where this machine has it."""
        return self._session.worker_stderr(self.location.pid) if self.location is not None else ""

    def kill_process(self) -> None:
        """Kill the actor's process itself, where this driver can: Ray takes 5 s to end a frozen one."""
        if self.location is not None and not self.is_gone():
            try:
                os.kill(self.location.pid, signal.SIGKILL)
            except ProcessLookupError:
                _logger.debug("%s ended by itself", self.name)

    def is_gone(self) -> bool:
        """Whether the process has ended; on another node, where this driver cannot see it, Ray's word is taken."""
        if self.location is None or self._birth is None:
            return True
        return _birth_of(self.location.pid) != self._birth


def end_ranks(ranks: Sequence[Rank]) -> None:
    """End actors and wait until their processes are gone, so that their memory is free again.

    A unit may be handed out again only after this: until then the old process may still be writing.
    """
    for rank in ranks:
        ray.kill(rank.actor, no_restart=True)
    if not _all_gone(ranks, _LEAVE_TIMEOUT_S):
        for rank in ranks:
            rank.kill_process()
        if not _all_gone(ranks, _GONE_TIMEOUT_S):
            names = ", ".join(rank.name for rank in ranks if not rank.is_gone())
            _logger.warning("still there %.0f s after SIGKILL: the processes of %s", _GONE_TIMEOUT_S, names)


def _all_gone(ranks: Sequence[Rank], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not all(rank.is_gone() for rank in ranks):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _birth_of(pid: int) -> str | None:
    """When the process `pid` was born, in clock ticks since boot: with it, a process id names one process for ever.

    None when there is no such process, when it has ended and only waits for its parent, and where there is no /proc. One whose
    first thread has ended, but not all, has its memory still.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, num_threads, birth = fields[0], int(fields[17]), fields[19]
    return None if state == "X" or (state == "Z" and num_threads <= 1) else birth
