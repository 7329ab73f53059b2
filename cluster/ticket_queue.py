"""What waits for a worker: by priority, then in order, except that a worker goes on with the kind of unit it has at hand."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Ticket:
    """One unit on its way through the pool."""

    serial: int
    """Of this attempt, or of those before it that were made in other processes."""
    name: str
    payload: Any
    affinity: str = ""
    """`Unit.affinity`."""
    attempt: int = 0
    """Attempts begun."""
    error: str | None = None
    """The worker's own, of the attempt before; None after another end, such as its death."""
    alone: bool = False
    """Share no round of a replica with another unit: one of them has failed, and it must be seen which."""
    priority: int = 0
    """`Unit.priority`."""
    single: bool = False
    """`Unit.single`."""
    prepared: bool = False
    """`Unit.prepared`."""
    promised_to: str = ""
    """The worker that prepares it."""
    lean: bool = False
    """It has run out of memory: its worker is told to do it with less."""
    fresh: bool = False
    """Only for a worker that has done nothing yet: it has run out of memory in one that was told."""


class TicketQueue:
    """The lowest priority number first; in it first come, first served within an affinity; among affinities, see `take`."""

    def __init__(self, tickets: Iterable[Ticket] = ()) -> None:
        self._levels: dict[int, dict[str, deque[Ticket]]] = {}
        self._fresh: deque[Ticket] = deque()
        for ticket in tickets:
            self.append(ticket)

    def __len__(self) -> int:
        return sum(self.by_priority().values())

    def by_priority(self) -> dict[int, int]:
        """How many wait, by priority."""
        waiting = Counter(ticket.priority for ticket in self._fresh)
        waiting.update({priority: sum(map(len, level.values())) for priority, level in self._levels.items()})
        return dict(waiting)

    def has_for(self, last: str | None) -> bool:
        """Whether something waits that `take` may give to a worker that did a unit of the affinity `last`."""
        return bool(self._levels) or (last is None and bool(self._fresh))

    def append(self, ticket: Ticket) -> None:
        """Behind all of its priority and affinity, or of those for new workers."""
        if ticket.fresh:
            self._fresh.append(ticket)
            return
        self._levels.setdefault(ticket.priority, {}).setdefault(ticket.affinity, deque()).append(ticket)

    def take(self, last: str | None, at_work: Iterable[str], worker: str = "") -> Ticket:
        """The next ticket for a worker that did a unit of the affinity `last`, None for a new worker.

        A new worker takes what only a new one may. Among those of the first priority a worker goes on with its own affinity.
        Where none of that waits, it takes the affinity at which the fewest workers are (`at_work`: of every busy one), of equal
        ones that which came first. In the affinity it takes what it was promised, then what nobody was, then anything.

        Raises:
            IndexError: nothing waits for it.
        """
        if last is None and self._fresh:
            return self._fresh.popleft()
        if not self._levels:
            raise IndexError("no ticket waits")
        priority = min(self._levels)
        level = self._levels[priority]
        if last is None or last not in level:
            busy = Counter(at_work)
            last = min(level, key=lambda affinity: busy[affinity])
        ticket = _best_of(level[last], worker)
        level[last].remove(ticket)
        ticket.promised_to = ""
        if not level[last]:
            del level[last]
        if not level:
            del self._levels[priority]
        return ticket

    def promise(self, affinity: str, worker: str) -> Ticket | None:
        """What the worker will probably take next, if it can be prepared: nobody else gets it before the others are gone."""
        waiting = self._levels[min(self._levels)].get(affinity, ()) if self._levels else ()
        ticket = next((t for t in waiting if t.promised_to == worker), None)
        ticket = ticket or next((t for t in waiting if not t.promised_to), None)
        if ticket is None or not ticket.prepared:
            return None
        ticket.promised_to = worker
        return ticket

    def take_round(self, last: str | None, at_work: Iterable[str], num: int, worker: str = "") -> list[Ticket]:
        """`take`, and up to `num` in all that follow it in its priority and affinity; a ticket that is to be alone is."""
        tickets = [self.take(last, at_work, worker)]
        affinity, priority = tickets[0].affinity, tickets[0].priority
        while len(tickets) < num and not tickets[0].alone:
            following = self._levels.get(priority, {}).get(affinity)
            if not following or following[0].alone:
                break
            tickets.append(self.take(affinity, ()))
        return tickets


def _best_of(tickets: deque[Ticket], worker: str) -> Ticket:
    """Promised to the worker, else promised to nobody, else the first."""
    free = None
    for ticket in tickets:
        if not ticket.promised_to:
            free = free or ticket
            if not ticket.prepared:
                break
        elif ticket.promised_to == worker:
            return ticket
    return free or tickets[0]
