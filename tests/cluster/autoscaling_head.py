"""A Ray cluster of one machine whose nodes come and go: Ray's own autoscaler, with real raylets as nodes.

The nodes are those of Ray's fake provider: processes of this machine, with GPUs that exist in Ray's books only. Ray's own
`AutoscalingCluster` needs a file that is not in its wheel, and ends every Ray process of the user.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from cluster.session_directory import session_directory
from tests.cluster.ray_head import QUICK_HEALTH_CHECKS, ROOT, RayHead

FAKE = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"

IDLE_TIMEOUT_S = 5.0
"""After which the autoscaler takes a node away."""


class AutoscalingHead(RayHead):
    """A head without CPUs or GPUs for workers, and an autoscaler.

    Args:
        directory: the cluster's own.
        node_types: by name, resources and `max_workers`.
        provider: class of the cloud's part.
        version: of the autoscaler; 2 is what `ray up` has started since Ray 2.50.
    """

    def __init__(
        self, directory: Path, node_types: Mapping[str, Mapping[str, Any]], *, provider: str = FAKE, version: int = 2
    ) -> None:
        self._node_types, self._provider = node_types, provider
        super().__init__(
            directory,
            num_cpus=0,
            RAY_FAKE_CLUSTER="1",
            PYTHONPATH=str(ROOT),  # of the provider's class
            AUTOSCALER_UPDATE_INTERVAL_S="1",  # 5 s otherwise
            **QUICK_HEALTH_CHECKS,
            **({"RAY_enable_autoscaler_v2": "1"} if version == 2 else {}),
            RAY_CLOUD_INSTANCE_ID=FAKE_HEAD_NODE_ID,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=FAKE_HEAD_NODE_ID,
            RAY_NODE_TYPE_NAME=FAKE_HEAD_NODE_TYPE,
        )

    def more_arguments(self) -> list[str]:
        """The autoscaler's configuration."""
        nothing: dict[str, Any] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        nodes = {
            name: {
                "resources": {**node_type["resources"], "object_store_memory": 80 * 2**20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": node_type["max_workers"],
            }
            for name, node_type in self._node_types.items()
        }
        config = {
            "cluster_name": "reelquant-test",
            "max_workers": sum(node_type["max_workers"] for node_type in nodes.values()),
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": IDLE_TIMEOUT_S / 60,
            "provider": {
                # Not "fake_multinode": its defaults are in the file that is not in the wheel.
                "type": "external",
                "module": self._provider,
                "gcs_address": self.address,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "auth": {},
            "docker": {},
            "available_node_types": {FAKE_HEAD_NODE_TYPE: nothing, **nodes},
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            "file_mounts": {},
            **{f"{prefix}setup_commands": [] for prefix in ("", "head_", "worker_")},
            **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
            **{
                name: []
                for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")
            },
        }
        path = self.directory / "autoscaling.json"
        path.write_text(json.dumps(config))
        return [f"--autoscaling-config={path}"]

    def raylets(self) -> list[psutil.Process]:
        """Of the nodes that the autoscaler has started and not taken away, the oldest first."""
        found = []
        for process in self.daemons():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "raylet" and process.environ().get("RAY_NODE_TYPE_NAME") != FAKE_HEAD_NODE_TYPE:
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def take_away(self, raylet: psutil.Process) -> None:
        """End a node at once, as a cloud does that wants its machine back."""
        for process in [*raylet.children(recursive=True), raylet]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def autoscaling_head(
    node_types: Mapping[str, Mapping[str, Any]], *, provider: str = FAKE, version: int = 2
) -> Iterator[AutoscalingHead]:
    """A head that is gone in the end, and its nodes with it."""
    with session_directory(Path("/tmp")) as directory:
        head = AutoscalingHead(directory, node_types, provider=provider, version=version)
        try:
            yield head
        finally:
            head.kill()
