"""Hand units of work to worker processes, one at a time each, and survive what happens to them.

| what happens | what is done |
|---|---|
| the process dies, or Ray loses sight of it | it is ended for certain, its unit goes to another or new process |
| no `progress` for `stall_timeout_s` | the same: Ray itself never notices a process that hangs |
| the worker raises | the same: after a CUDA error a process is of no more use |
| the worker raises ValueError | the unit is set aside at once, the process goes on |
| a unit fails `max_attempts` times | it is set aside, the others are finished, then `UnitsFailed` names it |
| a worker cannot be started `max_attempts` times in a row | its slot is closed; when all are: `WorkersFailed` |

Ray's own restarts and retries are off: they re-run old calls out of order, and a poison unit without end. A unit may
run twice, never twice at the same time on one machine: what it writes must be atomic and the same every time.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.session import Session, active_session
from cluster.ticket_queue import Ticket, TicketQueue
from cluster.unit_actor import Location, Outcome, Pulse, Worker
from cluster.units import PoolEvents, Unit, UnitFailure, UnitsFailed, WorkersFailed
from cluster.worker_slot import SlotState, WorkerRecipe, WorkerSlot, end_actors, end_unfit_actors

__all__ = ["PoolEvents", "Unit", "UnitFailure", "UnitsFailed", "WorkersFailed", "run_units"]

_logger = logging.getLogger(__name__)

# How long a process may take to answer that it lives, before silence about progress is held against it.
_ANSWER_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class _Limits:
    max_attempts: int
    stall_timeout_s: float
    startup_timeout_s: float
    placement_timeout_s: float
    progress_interval_s: float
    keep_workers: bool


def run_units(
    worker_class: type[Worker],
    settings: Any,
    units: Sequence[Unit],
    *,
    num_workers: int,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    max_attempts: int = 3,
    stall_timeout_s: float,
    startup_timeout_s: float = 1800.0,
    placement_timeout_s: float = 600.0,
    progress_interval_s: float = 0.5,
    keep_workers: bool = False,
    events: PoolEvents | None = None,
) -> dict[str, Any]:
    """Do all units on workers `worker_class(settings)` in the open session; return the results by unit name.

    Args:
        worker_class: a class as `cluster.unit_actor.Worker` describes it; importable, or defined in `__main__`.
        settings: what its constructor gets.
        num_workers: at most so many workers; fewer when there are fewer units or a local session has less room.
        num_cpus: CPUs of one worker. Ray sets OMP_NUM_THREADS to it where the environment has none.
        num_gpus: GPUs of one worker, a fraction to share one; Ray sets CUDA_VISIBLE_DEVICES accordingly.
        max_attempts: attempts at a unit, and at starting a worker.
        stall_timeout_s: longest silence of a worker during a unit.
        startup_timeout_s: longest construction of a worker: loading a model, for example.
        placement_timeout_s: longest wait for the first node with room, while no worker is placed at all.
        progress_interval_s: how often a busy worker is asked how far it is.
        keep_workers: leave idle processes without a whole GPU to the next call in this session, which saves it their
            imports.

    Raises:
        ValueError: two units of one name, a limit out of range, or a worker that no machine of a local session can hold.
        UnitsFailed: after all other units are finished.
        WorkersFailed: no worker could be started.
    """
    session = active_session()
    _check_arguments(units, num_workers, num_cpus, num_gpus)
    _check_limits(max_attempts, stall_timeout_s, startup_timeout_s, placement_timeout_s, progress_interval_s)
    recipe = WorkerRecipe(worker_class, settings, num_cpus, num_gpus)
    limits = _Limits(
        max_attempts, stall_timeout_s, startup_timeout_s, placement_timeout_s, progress_interval_s, keep_workers
    )
    num_slots = min(num_workers, len(units), _room(session, recipe))
    end_unfit_actors(session, recipe)
    slots = [WorkerSlot(f"worker-{index}", recipe, session) for index in range(num_slots)]
    return _Pool(slots, units, limits, events or PoolEvents()).run()


class _Pool:
    def __init__(self, slots: list[WorkerSlot], units: Sequence[Unit], limits: _Limits, events: PoolEvents) -> None:
        self._slots = slots
        self._order = [unit.name for unit in units]
        self._pending = TicketQueue(
            Ticket(serial, unit.name, unit.payload, unit.affinity) for serial, unit in enumerate(units)
        )
        self._limits = limits
        self._events = events
        self._results: dict[str, Any] = {}
        self._failures: dict[str, UnitFailure] = {}
        self._start_error = ""
        self._tick_s = min(limits.progress_interval_s, limits.stall_timeout_s / 4, 0.5)

    def run(self) -> dict[str, Any]:
        try:
            checked_at = time.monotonic()
            while self._pending or any(slot.state is SlotState.BUSY for slot in self._slots):
                self._hand_out()
                self._collect()
                checked_at = self._check_clocks(checked_at)
            if self._limits.keep_workers:
                for slot in self._slots:
                    slot.park()
        finally:
            end_actors(self._slots)
        ordered = {name: self._results[name] for name in self._order if name in self._results}
        if self._failures:
            raise UnitsFailed(self._failures, ordered)
        return ordered

    def _hand_out(self) -> None:
        for slot in self._in_state(SlotState.IDLE):
            if not self._pending:
                return
            at_work = [busy.ticket.affinity for busy in self._in_state(SlotState.BUSY) if busy.ticket is not None]
            ticket = self._pending.take(slot.last_affinity, at_work)
            ticket.attempt += 1
            slot.assign(ticket)
            self._events.started(ticket.name, slot.name)
        num_coming = len(self._in_state(SlotState.PLACING, SlotState.LOADING))
        for slot in self._in_state(SlotState.EMPTY)[: max(0, len(self._pending) - num_coming)]:
            slot.start()
        if self._pending and all(slot.state is SlotState.RETIRED for slot in self._slots):
            raise WorkersFailed(
                f"no worker could be started, {len(self._pending)} units are left; the last error:\n{self._start_error}"
            )

    def _collect(self) -> None:
        for slot in self._slots:
            slot.ask_pulse(self._limits.progress_interval_s)
        calls = {slot.call: slot for slot in self._slots if slot.call is not None}
        pulses = {slot.pulse_call: slot for slot in self._slots if slot.pulse_call is not None}
        waited = [*calls, *pulses]
        if not waited:
            return
        ready, others = ray.wait(waited, num_returns=1, timeout=self._tick_s)
        if ready and others:
            ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
        for reference in ready:
            if reference in calls:
                self._take_answer(calls[reference])
        for reference in ready:
            if reference in pulses and pulses[reference].pulse_call == reference:
                self._take_pulse(pulses[reference])

    def _take_answer(self, slot: WorkerSlot) -> None:
        try:
            answer = ray.get(slot.call)
        except RayError as error:
            self._lose(slot, _with_last_words(f"{type(error).__name__}: {error}", slot))
            return
        if isinstance(answer, Location):
            slot.load(answer)
        elif slot.state is SlotState.LOADING:
            self._take_loaded(slot, answer)
        else:
            self._take_outcome(slot, answer)

    def _take_loaded(self, slot: WorkerSlot, outcome: Outcome) -> None:
        if outcome.error is None:
            slot.num_failed_starts = 0
            slot.rest()
        else:
            self._lose(slot, outcome.error, retryable=outcome.retryable)

    def _take_outcome(self, slot: WorkerSlot, outcome: Outcome) -> None:
        ticket = slot.ticket
        assert ticket is not None
        if slot.see(outcome.pulse):
            self._events.progress(ticket.name, outcome.pulse.done, outcome.pulse.total)
        if outcome.error is not None and outcome.retryable:
            self._lose(slot, outcome.error)
            return
        slot.rest()
        if outcome.error is None:
            self._results[ticket.name] = outcome.result
            self._events.finished(ticket.name, outcome.result, outcome.seconds, ticket.attempt)
        else:
            self._fail(ticket, outcome.error, retryable=False)

    def _take_pulse(self, slot: WorkerSlot) -> None:
        reference, slot.pulse_call = slot.pulse_call, None
        try:
            pulse: Pulse = ray.get(reference)
        except RayError as error:  # the call itself fails too, and says more
            _logger.debug("%s has no pulse: %s", slot.name, error)
            return
        if slot.see(pulse):
            assert slot.ticket is not None
            self._events.progress(slot.ticket.name, pulse.done, pulse.total)
        elif slot.pulse_asked_at - slot.changed_at > self._limits.stall_timeout_s:
            self._lose_stalled(slot, slot.stack())

    def _lose_stalled(self, slot: WorkerSlot, stack: str) -> None:
        silence = f"no progress for {self._limits.stall_timeout_s:g} s; the worker was at:\n{stack}"
        self._lose(slot, _with_last_words(silence, slot))

    def _check_clocks(self, checked_at: float) -> float:
        """Look for what does not come. Time that the driver spent elsewhere, or stopped, is nobody's silence."""
        now = time.monotonic()
        for slot in self._in_state(SlotState.BUSY):
            if slot.pulse_call is not None:
                slot.pulse_waited_s += min(now - checked_at, 2 * self._tick_s)
                silent = now - slot.changed_at > self._limits.stall_timeout_s
                if silent and slot.pulse_waited_s > _ANSWER_TIMEOUT_S:
                    self._lose_stalled(slot, "(the process does not answer)\n")
        for slot in self._in_state(SlotState.LOADING):
            if now - slot.changed_at > self._limits.startup_timeout_s:
                self._lose(slot, f"not loaded after {self._limits.startup_timeout_s:g} s, at:\n{slot.stack()}")
        self._check_placement(now)
        return time.monotonic()

    def _check_placement(self, now: float) -> None:
        placing = self._in_state(SlotState.PLACING)
        if not placing or len(placing) < len(self._slots) - len(self._in_state(SlotState.EMPTY, SlotState.RETIRED)):
            return
        if min(now - slot.changed_at for slot in placing) > self._limits.placement_timeout_s:
            raise WorkersFailed(
                f"no node had room for a worker within {self._limits.placement_timeout_s:g} s: free now are "
                f"{ray.available_resources()}; add nodes, ask for less a worker, or raise placement_timeout_s"
            )

    def _lose(self, slot: WorkerSlot, error: str, *, retryable: bool = True) -> None:
        """The slot's process is of no more use: end it, and see to what it was doing."""
        ticket, was_starting = slot.ticket, slot.state is not SlotState.BUSY
        end_actors([slot])
        if was_starting:
            slot.num_failed_starts += 1
            self._start_error = error
            _logger.warning("%s could not be started: %s", slot.name, error)
            if not retryable or slot.num_failed_starts >= self._limits.max_attempts:
                slot.retire()
        else:
            assert ticket is not None
            self._fail(ticket, error, retryable=True)

    def _fail(self, ticket: Ticket, error: str, *, retryable: bool) -> None:
        will_retry = retryable and ticket.attempt < self._limits.max_attempts
        if will_retry:
            self._pending.append(ticket)
        else:
            self._failures[ticket.name] = UnitFailure(ticket.attempt, error)
        self._events.failed(ticket.name, ticket.attempt, error, will_retry)

    def _in_state(self, *states: SlotState) -> list[WorkerSlot]:
        return [slot for slot in self._slots if slot.state in states]


def _with_last_words(error: str, slot: WorkerSlot) -> str:
    words = slot.last_words()
    return f"{error}\nits last lines on standard error:\n{words}" if words else error


def _room(session: Session, recipe: WorkerRecipe) -> int:
    """How many workers a local session holds; an existing cluster may grow, so it sets no limit."""
    if not session.local:
        return 2**31
    room = session.capacity(num_cpus=recipe.num_cpus, num_gpus=recipe.num_gpus)
    if room < 1:
        raise ValueError(
            f"a worker asks for {recipe.num_cpus:g} CPUs and {recipe.num_gpus:g} GPUs, this session has "
            f"{session.num_cpus:g} and {session.num_gpus:g}: ask for less, or use a session with more"
        )
    return room


def _check_arguments(units: Sequence[Unit], num_workers: int, num_cpus: float, num_gpus: float) -> None:
    names = [unit.name for unit in units]
    doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubled:
        raise ValueError(f"unit names must be unique, these are not: {', '.join(doubled)}")
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}: at least 1 is needed")
    if num_cpus < 0 or num_gpus < 0 or (num_gpus > 1 and num_gpus != int(num_gpus)):
        raise ValueError(f"num_cpus is {num_cpus} and num_gpus {num_gpus}: >= 0, and whole GPUs above one")


def _check_limits(max_attempts: int, *seconds: float) -> None:
    if max_attempts < 1:
        raise ValueError(f"max_attempts is {max_attempts}: at least 1 is needed")
    if min(seconds) <= 0:
        raise ValueError(f"timeouts and progress_interval_s must be above 0 s, got {', '.join(map(str, seconds))}")
