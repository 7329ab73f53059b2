"""What waits for a worker, in order, except that a worker goes on with the kind of unit it has at hand."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class Ticket:
    """One unit on its way through the pool."""

    serial: int
    name: str
    payload: Any
    affinity: str = ""
    """`Unit.affinity`."""
    attempt: int = 0
    """Attempts begun."""
    alone: bool = False
    """Share no round of a replica with another unit: one of them has failed, and it must be seen which."""


class TicketQueue:
    """First come, first served within an affinity; among affinities, see `take`."""

    def __init__(self, tickets: Iterable[Ticket]) -> None:
        self._waiting: dict[str, deque[Ticket]] = {}
        for ticket in tickets:
            self.append(ticket)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def append(self, ticket: Ticket) -> None:
        """Behind all of its affinity."""
        self._waiting.setdefault(ticket.affinity, deque()).append(ticket)

    def take(self, last: str | None, at_work: Iterable[str]) -> Ticket:
        """The next ticket for a worker that did a unit of the affinity `last`, None for a new worker.

        It goes on with its own affinity. Where none of that waits, it takes the affinity at which the fewest workers are
        (`at_work`: of every busy one), of equal ones that which came first.

        Raises:
            IndexError: nothing waits.
        """
        if not self._waiting:
            raise IndexError("no ticket waits")
        if last is None or last not in self._waiting:
            busy = Counter(at_work)
            last = min(self._waiting, key=lambda affinity: busy[affinity])
        tickets = self._waiting[last]
        ticket = tickets.popleft()
        if not tickets:
            del self._waiting[last]
        return ticket

    def take_round(self, last: str | None, at_work: Iterable[str], num: int) -> list[Ticket]:
        """`take`, and up to `num` in all that follow it in its affinity; a ticket that is to be alone is."""
        tickets = [self.take(last, at_work)]
        affinity = tickets[0].affinity
        while len(tickets) < num and not tickets[0].alone:
            following = self._waiting.get(affinity)
            if not following or following[0].alone:
                break
            tickets.append(self.take(affinity, ()))
        return tickets
