"""One place of a worker pool, and the actors that fill it at the moment: one, or the ranks of a replica.

```
EMPTY --start--> PLACING --all located--> LOADING --all loaded--> IDLE <--all answered / assign--> BUSY
  ^                 |                        |                                                      |
  +------ end ------+------------------------+------------------------------------------------------+   RETIRED: no more starts
```

A replica's ranks hold one model together and wait for each other, so they live and die together: all are placed before any
loads, each does a unit of a round, and when one fails all are ended. Their actors are in one placement group, on one node
if one has room. Each generation of a replica meets at a new port, on which its rank 0
listens from the moment it has a place.
"""

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.rank import Rank, end_ranks
from cluster.session import Session
from cluster.ticket_queue import Ticket
from cluster.unit_actor import Location, Membership, UnitActor, Worker
from cluster.units import resources_in_words

_untyped_remote: Any = ray.remote  # its types do not know concurrency_groups
_REMOTE_ACTOR: Any = _untyped_remote(max_restarts=0, max_task_retries=0, concurrency_groups={"pulse": 1})(UnitActor)


class SlotState(enum.Enum):
    """Where a slot is in the life of its actors."""

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
    """Of one rank."""
    num_gpus: float
    """Of one rank."""
    num_ranks: int | None = None
    """Of a replica; None for a worker of one process that is none."""

    def size_in_words(self) -> str:
        """Such as "2 ranks of 1 CPU and 1 GPU"."""
        ranks = f"{self.num_ranks} ranks of " if self.num_ranks is not None and self.num_ranks > 1 else ""
        return f"{ranks}{resources_in_words(self.num_cpus, self.num_gpus)}"


class WorkerSlot:
    """A slot makes actors, one set after another, and hands them their work."""

    def __init__(self, name: str, recipe: WorkerRecipe, session: Session) -> None:
        self.name = name
        self.state = SlotState.EMPTY
        self.ranks: list[Rank] = []
        """The present actors."""
        self.last_affinity: str | None = None
        """Of the last unit of the present actors."""
        self.num_rounds = 0
        """How often the present actors were given work."""
        self.changed_at = 0.0
        """When the state last changed. Monotonic seconds of the driver."""
        self.num_failed_starts = 0
        self.recipe = recipe
        self._session = session
        self._group: Any = None

    @property
    def num_ranks(self) -> int:
        """Actors that fill the slot."""
        return self.recipe.num_ranks or 1

    @property
    def single(self) -> bool:
        """Whether its worker is one process, and no replica."""
        return self.recipe.num_ranks is None

    @property
    def waits(self) -> bool:
        """Whether an actor has yet to answer."""
        return any(rank.call is not None for rank in self.ranks)

    def start(self) -> None:
        """Make actors and ask them where they are."""
        recipe = self.recipe
        resources = {"num_cpus": recipe.num_cpus, "num_gpus": recipe.num_gpus}
        if recipe.num_ranks is None:
            self.ranks = [Rank(self.name, _REMOTE_ACTOR.options(**resources).remote(), self._session)]
        else:
            bundle = {"CPU": recipe.num_cpus, "GPU": recipe.num_gpus}
            bundle = {name: amount for name, amount in bundle.items() if amount > 0}
            self._group = placement_group([bundle] * recipe.num_ranks, strategy="PACK")
            for index in range(recipe.num_ranks):
                place = PlacementGroupSchedulingStrategy(self._group, index)
                actor = _REMOTE_ACTOR.options(**resources, scheduling_strategy=place).remote()
                self.ranks.append(Rank(f"{self.name}.{index}", actor, self._session))
        self._enter(SlotState.PLACING)
        for index, rank in enumerate(self.ranks):
            rank.ask(rank.actor.locate.remote(listen=index == 0 and not self.single))

    def take_place(self, rank: Rank, location: Location) -> None:
        """An actor has a place. When all have, construct the worker in each."""
        rank.take_place(location)
        places = [other.location for other in self.ranks]
        if self.waits or places[0] is None:
            return
        self._enter(SlotState.LOADING)
        for index, other in enumerate(self.ranks):
            membership = None
            if places[0].port is not None:
                membership = Membership(index, self.num_ranks, places[0].address, places[0].port)
            other.ask(other.actor.load.remote(self.recipe.worker_class, self.recipe.settings, membership))

    def rest(self) -> None:
        """The actors wait for a unit."""
        for rank in self.ranks:
            rank.rest()
        self._enter(SlotState.IDLE)

    def assign(self, tickets: Sequence[Ticket], following: Ticket | None = None) -> None:
        """Give the idle actors a unit each, and rank 0's to shadow to those that are left over.

        Args:
            tickets: one a rank, or fewer.
            following: what a worker of one process prepares meanwhile.
        """
        self.last_affinity = tickets[0].affinity
        self.num_rounds += 1
        self._enter(SlotState.BUSY)
        for index, rank in enumerate(self.ranks):
            shadow = index >= len(tickets)
            rank.assign(tickets[0] if shadow else tickets[index], shadow=shadow, following=following)

    def clear(self) -> None:
        """Forget the actors."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        self.ranks, self.last_affinity, self.num_rounds = [], None, 0
        self._enter(SlotState.EMPTY)

    def retire(self) -> None:
        """Use this slot no more."""
        self._enter(SlotState.RETIRED)

    def _enter(self, state: SlotState) -> None:
        self.state = state
        self.changed_at = time.monotonic()


def end_slots(slots: Sequence[WorkerSlot]) -> None:
    """End all actors of `slots`, as `end_ranks` does, and leave the slots empty."""
    end_ranks([rank for slot in slots for rank in slot.ranks])
    for slot in slots:
        slot.clear()
