"""One place of a worker pool, and the actor that fills it at the moment.

```
EMPTY --start--> PLACING --located--> LOADING --loaded--> IDLE <--outcome/assign--> BUSY
  ^                 |                    |                                          |
  +------ end ------+--------------------+------------------------------------------+    RETIRED: no more starts
```
"""

import enum
import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.session import Session
from cluster.ticket_queue import Ticket
from cluster.unit_actor import Location, Pulse, UnitActor, Worker

_logger = logging.getLogger(__name__)

_untyped_remote: Any = ray.remote  # its types do not know concurrency_groups
_REMOTE_ACTOR: Any = _untyped_remote(max_restarts=0, max_task_retries=0, concurrency_groups={"pulse": 1})(UnitActor)

_LEAVE_TIMEOUT_S = 0.5  # an actor that is neither frozen nor dying leaves within 0.1 s
_GONE_TIMEOUT_S = 10.0


class SlotState(enum.Enum):
    """Where a slot is in the life of its actor."""

    EMPTY = enum.auto()
    PLACING = enum.auto()
    LOADING = enum.auto()
    IDLE = enum.auto()
    BUSY = enum.auto()
    RETIRED = enum.auto()


@dataclass(frozen=True)
class WorkerRecipe:
    """How to make a worker."""

    worker_class: type[Worker]
    settings: Any
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class ParkedActor:
    """An actor between two pools: its process has imported what workers need, which takes longer than most units."""

    actor: Any
    location: Location
    num_cpus: float
    num_gpus: float


class WorkerSlot:
    """A slot makes actors, one after another, and talks to the present one; what to do about errors the pool decides."""

    def __init__(self, name: str, recipe: WorkerRecipe, session: Session) -> None:
        self.name = name
        self.state = SlotState.EMPTY
        self.ticket: Ticket | None = None
        self.last_affinity: str | None = None
        """Of the last unit of the present actor."""
        self.call: Any = None
        """Reference to the answer being waited for: place, load or run."""
        self.pulse_call: Any = None
        """Reference to the pulse being waited for."""
        self.pulse_asked_at = 0.0
        """When it was asked for. Monotonic seconds of the driver."""
        self.pulse_waited_s = 0.0
        """For how long the pool has waited for it."""
        self.changed_at = 0.0
        """When the slot last showed life: a change of state, or progress. Monotonic seconds of the driver."""
        self.num_failed_starts = 0
        self._recipe = recipe
        self._session = session
        self._actor: Any = None
        self._location: Location | None = None
        self._birth: str | None = None
        self._pulse: Pulse | None = None
        self._next_pulse_at = 0.0

    def start(self) -> None:
        """Take over a parked actor; where there is none, make one and ask it where it is."""
        if self._session.parked:
            parked: ParkedActor = self._session.parked.pop()
            self._actor = parked.actor
            self.load(parked.location)
            return
        options = _REMOTE_ACTOR.options(num_cpus=self._recipe.num_cpus, num_gpus=self._recipe.num_gpus)
        self._actor = options.remote()
        self._enter(SlotState.PLACING, self._actor.locate.remote())

    def load(self, location: Location) -> None:
        """The actor has a place: construct the worker there."""
        self._location = location
        is_here = location.node_id == ray.get_runtime_context().get_node_id()
        self._birth = _birth_of(location.pid) if is_here else None
        self._enter(SlotState.LOADING, self._actor.load.remote(self._recipe.worker_class, self._recipe.settings))

    def rest(self) -> None:
        """The actor waits for a unit."""
        self.ticket = None
        self._enter(SlotState.IDLE, None)

    def assign(self, ticket: Ticket) -> None:
        """Give the idle actor a unit."""
        self.ticket, self.last_affinity = ticket, ticket.affinity
        self._pulse = None
        self._next_pulse_at = 0.0
        self._enter(SlotState.BUSY, self._actor.run.remote(ticket.serial, ticket.payload))

    def ask_pulse(self, interval_s: float) -> None:
        """Ask a busy actor for its pulse, every `interval_s` and one question at a time."""
        now = time.monotonic()
        if self.state is not SlotState.BUSY or self.pulse_call is not None:
            return
        if self._next_pulse_at == 0.0:  # short units are never asked
            self._next_pulse_at = self.changed_at + interval_s
        if now >= self._next_pulse_at:
            self._next_pulse_at = now + interval_s
            self.pulse_asked_at, self.pulse_waited_s = now, 0.0
            self.pulse_call = self._actor.pulse.remote()

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
            return str(ray.get(self._actor.stack.remote(), timeout=1.0))
        except (GetTimeoutError, RayError) as error:
            return f"(the process does not answer: {type(error).__name__})\n"

    def last_words(self) -> str:
        """The end of what the actor's process wrote to its standard error, where this machine has it."""
        return self._session.worker_stderr(self._location.pid) if self._location is not None else ""

    def end(self) -> None:
        """Tell Ray to end the actor; `end_actors` sees to the rest."""
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)

    def kill_process(self) -> None:
        """Kill the actor's process itself, where this driver can: Ray takes 5 s to end a frozen one."""
        if self._location is not None and not self.is_gone():
            try:
                os.kill(self._location.pid, signal.SIGKILL)
            except ProcessLookupError:
                _logger.debug("%s ended by itself", self.name)

    def park(self) -> None:
        """Leave an idle actor to the next pool. One with a whole GPU is not kept: its memory is wanted by others."""
        recipe = self._recipe
        if self.state is SlotState.IDLE and recipe.num_gpus < 1 and self._location is not None:
            parked = ParkedActor(self._actor, self._location, recipe.num_cpus, recipe.num_gpus)
            self._session.parked.append(parked)
            self.clear()

    def clear(self) -> None:
        """Forget the actor."""
        self._actor = self._location = self._birth = self._pulse = self.pulse_call = None
        self.ticket = self.last_affinity = None
        self._enter(SlotState.EMPTY, None)

    def retire(self) -> None:
        """Use this slot no more."""
        self._enter(SlotState.RETIRED, None)

    def is_gone(self) -> bool:
        """Whether the process has ended; on another node, where this driver cannot see it, Ray's word is taken."""
        if self._location is None or self._birth is None:
            return True
        return _birth_of(self._location.pid) != self._birth

    def _enter(self, state: SlotState, call: Any) -> None:
        self.state = state
        self.call = call
        self.changed_at = time.monotonic()


def end_unfit_actors(session: Session, recipe: WorkerRecipe) -> None:
    """End the parked actors that a worker of `recipe` cannot be put into."""
    wanted = (recipe.num_cpus, recipe.num_gpus)
    fit = [parked for parked in session.parked if (parked.num_cpus, parked.num_gpus) == wanted]
    for parked in session.parked:
        if parked not in fit:
            ray.kill(parked.actor, no_restart=True)
    session.parked[:] = fit


def end_actors(slots: Sequence[WorkerSlot]) -> None:
    """End the actors of `slots` and wait until their processes are gone, so that their memory is free again.

    A unit may be handed out again only after this: until then the old process may still be writing.
    """
    for slot in slots:
        slot.end()
    if not _all_gone(slots, _LEAVE_TIMEOUT_S):
        for slot in slots:
            slot.kill_process()
        if not _all_gone(slots, _GONE_TIMEOUT_S):
            names = ", ".join(slot.name for slot in slots if not slot.is_gone())
            _logger.warning("still there %.0f s after SIGKILL: the processes of %s", _GONE_TIMEOUT_S, names)
    for slot in slots:
        slot.clear()


def _all_gone(slots: Sequence[WorkerSlot], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not all(slot.is_gone() for slot in slots):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _birth_of(pid: int) -> str | None:
    """When the process `pid` was born, in clock ticks since boot: with it, a process id names one process for ever.

    None when there is no such process, when it has ended and only waits for its parent, and where there is no /proc.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
