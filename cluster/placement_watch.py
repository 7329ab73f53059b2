"""While none of a pool's workers has a place: what it waits for, and for how long that makes sense.

An existing cluster may grow: by its autoscaler, which adds nodes for the actors and placement groups that wait, or by hand.
"""

import time
from collections.abc import Callable

import ray

from cluster.autoscaler import AutoscalerState, autoscaler_state, nodes_in_words, room_of_nodes
from cluster.crew import Crew
from cluster.units import WorkersFailed
from cluster.worker_slot import SlotState, WorkerSlot

_NOTICE_S = 5.0
"""A free place is found sooner; also how often the cluster is asked again."""
_INFEASIBLE_S = 60.0
"""Some rounds of an autoscaler, which looks every 5 s and counts nodes that are on their way out."""


class PlacementWatch:
    """Looks at a pool again and again.

    Args:
        timeout_s: longest wait for a first place.
        tell: takes what it waits for, whenever that changes.
    """

    def __init__(self, timeout_s: float, tell: Callable[[str], None]) -> None:
        self._timeout_s, self._tell = timeout_s, tell
        self._since: float | None = None
        self._look_at = 0.0
        self._told = ""

    def check(self, crew: Crew) -> None:
        """Tell what is waited for.

        Raises:
            WorkersFailed: for too long, or for what no node of the cluster will ever have.
        """
        placing = crew.in_state(SlotState.PLACING)
        if not placing or crew.in_state(SlotState.LOADING, SlotState.IDLE, SlotState.BUSY):
            self._since = None
            return
        now = time.monotonic()
        if self._since is None:
            self._since, self._look_at, self._told = now, now + _NOTICE_S, ""
        if now - self._since > self._timeout_s:
            raise WorkersFailed(
                f"no node had room for a worker within {self._timeout_s:g} s: {_description(crew, autoscaler_state())}; free "
                f"now are {ray.available_resources()}; add nodes, ask for less a worker, or raise placement_timeout_s"
            )
        if now >= self._look_at and not crew.is_local:
            self._look_at = now + _NOTICE_S
            state = autoscaler_state()
            if state is not None and now - self._since >= min(_INFEASIBLE_S, self._timeout_s / 2):
                _check_feasible(crew, state)
            if (description := _description(crew, state)) != self._told:
                self._told = description
                self._tell(description)


def _check_feasible(crew: Crew, state: AutoscalerState) -> None:
    if not state.is_infeasible or state.num_coming or state.failures:
        return
    wanted = [slots[0].recipe for slots in _placing(crew)]
    if any(room_of_nodes(recipe.num_cpus, recipe.num_gpus) >= (recipe.num_ranks or 1) for recipe in wanted):
        return  # taken by somebody who may leave
    raise WorkersFailed(
        f"the cluster will not have room for a worker: {_description(crew, state)}, because its node types, with their "
        "max_workers, have no room for one; ask for less a worker, or add a node type or raise max_workers in the cluster's "
        "configuration"
    )


def _description(crew: Crew, state: AutoscalerState | None) -> str:
    parts = [_wanted(slots) for slots in _placing(crew)]
    words = "" if state is None else f"; {state}"
    return f"waiting for {' and '.join(parts)}: the cluster has {nodes_in_words()}{words}"


def _wanted(slots: list[WorkerSlot]) -> str:
    """Such as "6 workers of 1 CPU and 0 GPUs (2 fit at a time: they are starting, unless others use the cluster)"."""
    recipe = slots[0].recipe
    wanted = f"{len(slots)} worker{'s' if len(slots) != 1 else ''} of {recipe.size_in_words()}"
    fitting = min(len(slots), room_of_nodes(recipe.num_cpus, recipe.num_gpus) // (recipe.num_ranks or 1))
    if fitting == 0:
        return wanted
    return f"{wanted} ({fitting} fit at a time: they are starting, unless others use the cluster)"


def _placing(crew: Crew) -> list[list[WorkerSlot]]:
    """By kind, without those of which there are none."""
    return [slots for kind in crew.kinds if (slots := crew.in_state(SlotState.PLACING, kind=kind))]
