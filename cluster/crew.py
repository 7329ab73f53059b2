"""The slots of a pool: one kind or two, replicas and workers of one process, which share the pool's processes.

Room goes to the units that wait, the most urgent first (`cluster.slot_shares`); who is at work keeps his. A worker for which
nothing waits makes room for one of the other kind at once, and ends by itself after a while: its GPU is free for others, and
a cluster that grows and shrinks by itself can give the node back.

A worker that waits for a place is what makes an autoscaler add a node. So there is one for every unit that waits, as far as the
pool may have so many, and none longer than that: no node is started for nothing.
"""

import math
import time
from collections.abc import Mapping

from cluster.session import Session
from cluster.slot_shares import Kind, worker_shares
from cluster.worker_slot import SlotState, WorkerRecipe, WorkerSlot, end_slots

_PLACE_S = 5.0
"""A worker for which there is room has its place sooner, even where its process has yet to be started."""


class Crew:
    """All slots of a pool.

    Args:
        recipes: by kind.
        most: largest number of slots, by kind.
        num_processes: of all workers together.
    """

    def __init__(
        self, recipes: Mapping[Kind, WorkerRecipe], most: Mapping[Kind, int], *, num_processes: int, session: Session
    ) -> None:
        self.slots: list[WorkerSlot] = []
        self._recipes, self._most = recipes, most
        self._num_processes, self._session = num_processes, session
        self._num_ranks = {kind: recipe.num_ranks or 1 for kind, recipe in recipes.items()}

    @property
    def is_local(self) -> bool:
        """Whether it is in a local session, which does not grow."""
        return self._session.local

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of which there may be slots."""
        return tuple(self._recipes)

    def in_state(self, *states: SlotState, kind: Kind | None = None) -> list[WorkerSlot]:
        """Slots in one of the states, of one kind or of all."""
        return [slot for slot in self.slots if slot.state in states and kind in (None, slot.single)]

    def grow(self, kind: Kind, num_units: int) -> None:
        """Have slots for so many units at once, as far as there may be so many."""
        wanted = min(self._most[kind], math.ceil(num_units / self._num_ranks[kind]))
        for index in range(sum(slot.single == kind for slot in self.slots), wanted):
            self.slots.append(WorkerSlot(f"worker-{index}", self._recipes[kind], self._session))

    def shares(self, waiting: Mapping[Kind, Mapping[int, int]]) -> dict[Kind, int]:
        """Workers of each kind that the waiting units, by kind and priority, should get."""
        at_work = sum(slot.num_ranks for slot in self.in_state(SlotState.BUSY))
        return worker_shares(waiting, self._num_ranks, free=self._num_processes - at_work)

    def start(self, shares: Mapping[Kind, int]) -> None:
        """Start workers up to `shares`, beside those at work; idle ones, for which nothing waits, make room, and those
        beyond `shares` wait for a place no longer."""
        idle = self.in_state(SlotState.IDLE)
        for kind, share in shares.items():
            num_coming = len(self.in_state(SlotState.PLACING, SlotState.LOADING, kind=kind))
            if surplus := self._waiting_long(kind)[: max(0, num_coming - share)]:
                end_slots(surplus)
                num_coming -= len(surplus)
            for slot in self.in_state(SlotState.EMPTY, kind=kind)[: max(0, share - num_coming)]:
                while idle and self._num_free() < slot.num_ranks:
                    end_slots([idle.pop()])
                if self._num_free() >= slot.num_ranks:
                    slot.start()

    def end_idle(self, timeout_s: float) -> None:
        """End the workers that have had nothing to do for so long; sooner where another one finds no place."""
        if self._waiting_long():
            timeout_s = min(timeout_s, _PLACE_S)
        now = time.monotonic()
        if late := [slot for slot in self.in_state(SlotState.IDLE) if now - slot.changed_at > timeout_s]:
            end_slots(late)

    def is_lost(self, kind: Kind) -> bool:
        """Whether no worker of the kind can be started any more."""
        return all(slot.state is SlotState.RETIRED for slot in self.slots if slot.single == kind)

    def _waiting_long(self, kind: Kind | None = None) -> list[WorkerSlot]:
        """Those that no node has room for at the moment."""
        now = time.monotonic()
        return [slot for slot in self.in_state(SlotState.PLACING, kind=kind) if now - slot.changed_at > _PLACE_S]

    def _num_free(self) -> int:
        living = [slot for slot in self.slots if slot.state not in (SlotState.EMPTY, SlotState.RETIRED)]
        return self._num_processes - sum(slot.num_ranks for slot in living)
