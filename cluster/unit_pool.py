"""The loop of a pool: hand out units, wait for answers, see to what does not come; `cluster.actor_pool` says what holds."""

import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.crew import Crew
from cluster.end_of_process import reason_of_death
from cluster.placement_watch import PlacementWatch
from cluster.pool_limits import PoolLimits
from cluster.rank import Rank
from cluster.ticket_queue import Ticket, TicketQueue
from cluster.unit_actor import Location, Outcome, Pulse
from cluster.units import PoolEvents, Unit, UnitFailure, UnitsFailed, WorkersFailed
from cluster.worker_slot import SlotState, WorkerSlot, end_slots

_logger = logging.getLogger(__name__)

# How long a process may take to answer that it lives, before silence about progress is held against it.
_ANSWER_TIMEOUT_S = 2.0


class UnitPool:
    """Does units with a crew, once."""

    def __init__(self, crew: Crew, units: Sequence[Unit], limits: PoolLimits, events: PoolEvents) -> None:
        self._crew = crew
        self._order: list[str] = []
        self._serials = itertools.count()
        self._pending = {kind: TicketQueue() for kind in crew.kinds}
        self._limits = limits
        self._events = events
        self._results: dict[str, Any] = {}
        self._failures: dict[str, UnitFailure] = {}
        self._start_error = ""
        self._placement = PlacementWatch(limits.placement_timeout_s, events.waiting)
        self._tick_s = min(limits.progress_interval_s, limits.stall_timeout_s / 4, 0.5)
        self._add(units)

    def run(self) -> dict[str, Any]:
        """Results by unit name.

        Raises:
            UnitsFailed: after all other units are finished.
            WorkersFailed: no worker could be started.
        """
        try:
            checked_at = time.monotonic()
            while any(self._pending.values()) or self._crew.in_state(SlotState.BUSY):
                self._hand_out()
                self._collect()
                checked_at = self._check_clocks(checked_at)
        finally:
            end_slots(self._crew.slots)
        ordered = {name: self._results[name] for name in self._order if name in self._results}
        if self._failures:
            raise UnitsFailed(self._failures, ordered)
        return ordered

    def _add(self, units: Iterable[Unit]) -> None:
        for unit in units:
            single = unit.single or False not in self._pending
            self._order.append(unit.name)
            ticket = Ticket(
                next(self._serials),
                unit.name,
                unit.payload,
                unit.affinity,
                priority=unit.priority,
                single=single,
                prepared=unit.prepared,
            )
            self._pending[single].append(ticket)
        for kind, queue in self._pending.items():
            at_work = sum(len(_under_way(slot)) for slot in self._crew.in_state(SlotState.BUSY, kind=kind))
            self._crew.grow(kind, len(queue) + at_work)

    def _hand_out(self) -> None:
        shares = self._crew.shares({kind: queue.by_priority() for kind, queue in self._pending.items()})
        for kind, queue in self._pending.items():
            idle = [s for s in self._crew.in_state(SlotState.IDLE, kind=kind) if queue.has_for(s.last_affinity)]
            for slot in idle[: shares[kind]]:
                if queue.has_for(slot.last_affinity):
                    self._assign(slot, queue)
                    shares[kind] -= 1
        self._crew.start(shares)
        num_left = sum(map(len, self._pending.values()))
        if any(queue and self._crew.is_lost(kind) for kind, queue in self._pending.items()):
            raise WorkersFailed(
                f"no worker could be started, {num_left} units are left; the last error: {self._start_error}"
            )

    def _assign(self, slot: WorkerSlot, queue: TicketQueue) -> None:
        at_work = [ticket.affinity for busy in self._crew.in_state(SlotState.BUSY) for ticket in _under_way(busy)]
        tickets = queue.take_round(slot.last_affinity, at_work, slot.num_ranks, slot.name)
        self._give(slot, tickets, queue.promise(tickets[0].affinity, slot.name) if slot.single else None)

    def _give(self, slot: WorkerSlot, tickets: Sequence[Ticket], following: Ticket | None) -> None:
        for ticket in tickets:
            ticket.attempt += 1
        slot.assign(tickets, following)
        for ticket, rank in zip(tickets, slot.ranks, strict=False):
            self._events.started(ticket.name, rank.name)

    def _collect(self) -> None:
        ranks = [(slot, rank) for slot in self._crew.slots for rank in slot.ranks]
        for _, rank in ranks:
            rank.ask_pulse(self._limits.progress_interval_s)
        calls = {rank.call: (slot, rank) for slot, rank in ranks if rank.call is not None}
        pulses = {rank.pulse_call: (slot, rank) for slot, rank in ranks if rank.pulse_call is not None}
        waited = [*calls, *pulses]
        if not waited:
            return
        ready, others = ray.wait(waited, num_returns=1, timeout=self._tick_s)
        if ready and others:
            ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
        # An answer may end its whole slot: what its other ranks have said is then of no more interest.
        for reference in ready:
            if reference in calls:
                slot, rank = calls[reference]
                if rank in slot.ranks:
                    self._take_answer(slot, rank)
        for reference in ready:
            if reference in pulses:
                slot, rank = pulses[reference]
                if rank in slot.ranks and rank.pulse_call == reference:
                    self._take_pulse(slot, rank)

    def _take_answer(self, slot: WorkerSlot, rank: Rank) -> None:
        try:
            answer = ray.get(rank.call)
        except RayError as error:
            words = rank.last_words()
            reason = f"{reason_of_death(error, words)}\n{type(error).__name__}: {error}"
            self._lose(slot, rank, _with_last_words(reason, words))
            return
        if isinstance(answer, Location):
            slot.take_place(rank, answer)
        elif slot.state is SlotState.LOADING:
            self._take_loaded(slot, rank, answer)
        else:
            self._take_outcome(slot, rank, answer)

    def _take_loaded(self, slot: WorkerSlot, rank: Rank, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._lose(slot, rank, outcome.error, retryable=outcome.retryable)
            return
        rank.rest()
        if not slot.waits:
            slot.num_failed_starts = 0
            slot.rest()

    def _take_outcome(self, slot: WorkerSlot, rank: Rank, outcome: Outcome) -> None:
        ticket, is_shadow = rank.ticket, rank.is_shadow
        assert ticket is not None
        if rank.see(outcome.pulse) and not is_shadow:
            self._events.progress(ticket.name, outcome.pulse.done, outcome.pulse.total)
        # After any error of its own, a rank no longer enters what the others wait in.
        if outcome.error is not None and outcome.out_of_memory:
            self._take_out_of_memory(slot, rank, outcome)
            return
        if outcome.error is not None and (outcome.retryable or slot.num_ranks > 1):
            # What one process raises twice with the same words it raises again; a rank may repeat what another one did to it.
            same = outcome.error == ticket.error and slot.num_ranks == 1 and not outcome.environmental
            self._lose(slot, rank, outcome.error, retryable=outcome.retryable and not same)
            ticket.error = outcome.error
            return
        rank.rest()
        if not slot.waits:
            slot.rest()
        if is_shadow:
            return
        if outcome.error is None:
            self._results[ticket.name] = outcome.result
            self._events.finished(ticket.name, outcome.result, outcome.seconds, ticket.attempt)
            self._add(self._events.released())
        else:
            self._fail(ticket, outcome.error, will_retry=False)

    def _take_out_of_memory(self, slot: WorkerSlot, rank: Rank, outcome: Outcome) -> None:
        """Once more in the same process, which is told to save memory; then in a new one, whose memory is in one piece; then no
        more: it would be the same again."""
        ticket, error = rank.ticket, outcome.error
        assert ticket is not None
        assert error is not None
        was_lean, ticket.lean = ticket.lean or outcome.saved_memory, True
        if slot.single and not was_lean and ticket.attempt < self._limits.max_attempts:
            self._events.failed(ticket.name, ticket.attempt, error, True, out_of_memory=True)
            rank.rest()
            ticket.serial = next(self._serials)
            self._give(slot, [ticket], None)
            return
        ticket.fresh = True
        self._lose(slot, rank, error, retryable=not (was_lean and slot.num_rounds == 1), out_of_memory=True)

    def _take_pulse(self, slot: WorkerSlot, rank: Rank) -> None:
        reference, rank.pulse_call = rank.pulse_call, None
        try:
            pulse: Pulse = ray.get(reference)
        except RayError as error:  # the call itself fails too, and says more
            _logger.debug("%s has no pulse: %s", rank.name, error)
            return
        if rank.see(pulse):
            assert rank.ticket is not None
            if not rank.is_shadow:
                self._events.progress(rank.ticket.name, pulse.done, pulse.total)
        elif rank.ticket is not None and rank.pulse_asked_at - rank.changed_at > self._limits.stall_timeout_s:
            self._lose_stalled(slot, rank, rank.stack())

    def _lose_stalled(self, slot: WorkerSlot, rank: Rank, stack: str) -> None:
        silence = f"no progress for {self._limits.stall_timeout_s:g} s; the worker was at:\n{stack}"
        self._lose(slot, rank, _with_last_words(silence, rank.last_words()))

    def _check_clocks(self, checked_at: float) -> float:
        """Look for what does not come. Time that the driver spent elsewhere, or stopped, is nobody's silence."""
        now = time.monotonic()
        busy = [(slot, rank) for slot in self._crew.in_state(SlotState.BUSY) for rank in slot.ranks]
        for slot, rank in busy:
            if rank in slot.ranks and rank.ticket is not None and rank.pulse_call is not None:
                rank.pulse_waited_s += min(now - checked_at, 2 * self._tick_s)
                silent = now - rank.changed_at > self._limits.stall_timeout_s
                if silent and rank.pulse_waited_s > _ANSWER_TIMEOUT_S:
                    self._lose_stalled(slot, rank, "(the process does not answer)\n")
        for slot in self._crew.in_state(SlotState.LOADING):
            if now - slot.changed_at > self._limits.startup_timeout_s:
                late = next(rank for rank in slot.ranks if rank.call is not None)
                self._lose(slot, late, f"not loaded after {self._limits.startup_timeout_s:g} s, at:\n{late.stack()}")
        self._placement.check(self._crew)
        self._crew.end_idle(self._limits.idle_timeout_s)
        return time.monotonic()

    def _lose(
        self, slot: WorkerSlot, rank: Rank, error: str, *, retryable: bool = True, out_of_memory: bool = False
    ) -> None:
        """The slot's processes are of no more use, because of `rank`: end them, and see to what they were doing."""
        tickets, was_starting = _under_way(slot), slot.state is not SlotState.BUSY
        end_slots([slot])
        if was_starting:
            slot.num_failed_starts += 1
            self._start_error = error
            _logger.warning("%s could not be started: %s", rank.name, error)
            if not retryable or slot.num_failed_starts >= self._limits.max_attempts:
                slot.retire()
            return
        for ticket in tickets:
            ticket.alone, ticket.error = slot.num_ranks > 1, None
            if ticket is rank.ticket:
                will_retry = retryable and ticket.attempt < self._limits.max_attempts
                self._fail(ticket, error, will_retry=will_retry, out_of_memory=out_of_memory)
            else:  # not by its own fault, and at most once: it will be alone
                self._fail(ticket, f"ended with its replica, whose {rank.name} failed: {error}", will_retry=True)

    def _fail(self, ticket: Ticket, error: str, *, will_retry: bool, out_of_memory: bool = False) -> None:
        if will_retry:
            self._pending[ticket.single].append(ticket)
        else:
            self._failures[ticket.name] = UnitFailure(ticket.attempt, error)
        self._events.failed(ticket.name, ticket.attempt, error, will_retry, out_of_memory=out_of_memory)
        if not will_retry:
            self._add(self._events.released())


def _under_way(slot: WorkerSlot) -> list[Ticket]:
    """The units that the slot has and that are not done."""
    return [rank.ticket for rank in slot.ranks if rank.ticket is not None and not rank.is_shadow]


def _with_last_words(error: str, words: str) -> str:
    return f"{error}\nits last lines on standard error:\n{words}" if words else error
