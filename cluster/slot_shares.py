"""How many workers of each kind a pool should have now: replicas, and workers of one process, share its processes."""

import math
from collections.abc import Mapping

Kind = bool
"""True for workers of one process beside replicas (`Unit.single`)."""


def worker_shares(
    waiting: Mapping[Kind, Mapping[int, int]], num_ranks: Mapping[Kind, int], *, free: int
) -> dict[Kind, int]:
    """Workers of each kind that the waiting units should get, the most urgent ones first.

    Args:
        waiting: number of units that wait, by kind and priority.
        num_ranks: processes of one worker, by kind.
        free: processes that are not at work.
    """
    shares = dict.fromkeys(waiting, 0)
    units = dict.fromkeys(waiting, 0)
    for priority in sorted({priority for level in waiting.values() for priority in level}):
        for kind, level in waiting.items():
            units[kind] += level.get(priority, 0)
            wanted = math.ceil(units[kind] / num_ranks[kind]) - shares[kind]
            granted = max(0, min(wanted, free // num_ranks[kind]))
            shares[kind] += granted
            free -= granted * num_ranks[kind]
    return shares
