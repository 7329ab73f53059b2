"""What the cluster has, and what its autoscaler says about what it lacks.

Only version 2 of Ray's autoscaler says so (`ray up` starts it; on Kubernetes it takes `autoscalerOptions.version: v2`).
"""

import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import worker as ray_driver
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayError

from cluster.units import resources_in_words

_logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 5
_IN_ITS_LOG = "the reason is in its log, monitor.log among Ray's logs on the head"
_untyped_driver: Any = ray_driver
_untyped_messages: Any = autoscaler_pb2


@dataclass(frozen=True)
class AutoscalerState:
    """At its last look, a few seconds ago."""

    num_coming: int
    """Nodes that it has asked for and that are not there yet."""
    failures: tuple[str, ...]
    """Why nodes that it asked for have not come, the same reason once."""
    is_infeasible: bool
    """Something waits for which its node types, with their largest numbers, leave no room."""

    def __str__(self) -> str:
        coming = f"the autoscaler is starting {self.num_coming} node{'s' if self.num_coming != 1 else ''}"
        if self.num_coming == 0:
            coming = "the autoscaler is starting no node"
        return "; ".join([coming, *(f"it has failed to start nodes: {failure}" for failure in self.failures)])


def autoscaler_state() -> AutoscalerState | None:
    """Of the open session's cluster; None where no autoscaler tells."""
    reply = _untyped_messages.GetClusterStatusReply()
    try:
        reply.ParseFromString(_untyped_driver.global_worker.gcs_client.get_cluster_status(timeout_s=_ANSWER_TIMEOUT_S))
    except RayError as error:
        _logger.debug("no word of the autoscaler: %s", error)
        return None
    state = reply.autoscaling_state
    if state.autoscaler_state_version == 0:
        return None
    # Actors of a placement group that has no place yet are in the list too, with resources that bear the group's name.
    waiting = [request.resources_bundle for request in state.infeasible_resource_requests]
    single = [bundle for bundle in waiting if not any("_group_" in name for name in bundle)]
    reasons = [failed.reason.strip() or _IN_ITS_LOG for failed in state.failed_instance_requests]
    failures = dict.fromkeys(reason.splitlines()[-1] for reason in reasons)
    return AutoscalerState(
        sum(request.count for request in state.pending_instance_requests) + len(state.pending_instances),
        tuple(failures),
        bool(single or state.infeasible_gang_resource_requests),
    )


def room_of_nodes(num_cpus: float, num_gpus: float) -> int:
    """How many processes of this size the nodes that are there would hold if nothing else ran on them."""
    sizes = [(name, amount) for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount > 0]
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min((int(node.get(name, 0.0) / amount) for name, amount in sizes), default=2**31) for node in nodes)


def nodes_in_words() -> str:
    """Such as "3 nodes with 8 CPUs and 2 GPUs"."""
    alive, resources = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
    return (
        f"{alive} node{'s' if alive != 1 else ''} with "
        f"{resources_in_words(resources.get('CPU', 0.0), resources.get('GPU', 0.0))}"
    )
