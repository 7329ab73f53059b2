"""The cluster files that ship: accepted by Ray or of the shape that KubeRay wants, and none of them open to strangers."""

import logging
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated import autoscaler_pb2

from tests.errors import raises

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "configs" / "clusters"
ONPREM, KUBERAY = CLUSTERS / "onprem.yaml", CLUSTERS / "kuberay.yaml"
LAUNCHER = [ROOT / "ray_cluster.yaml", ONPREM]
"""For Ray's own cluster launcher."""


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


@pytest.fixture
def config() -> dict[str, Any]:
    return load(ROOT / "ray_cluster.yaml")


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_ray_accepts_it(path: Path) -> None:
    validate_config(prepare_config(load(path)))


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_ray_would_refuse_a_slip(path: Path) -> None:
    with raises(Exception, "max_worker"):
        validate_config(prepare_config(load(path) | {"max_worker": 8}))


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_every_start_of_ray_is_with_authentication_and_the_dashboard_stays_at_home(path: Path) -> None:
    loaded = load(path)
    in_container = "--env RAY_AUTH_MODE=token" in loaded.get("docker", {}).get("run_options", [])
    starts = [c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in loaded[key]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    assert in_container or all("export RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert [source for target, source in loaded["file_mounts"].items() if target.endswith("/.ray/auth_token")] == [
        "~/.ray/auth_token"
    ]
    assert any("chmod 600" in command and "auth_token" in command for command in loaded["setup_commands"])


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_nodes_install_this_project(path: Path) -> None:
    loaded = load(path)
    assert any("pip install -e '.[application]'" in command for command in loaded["setup_commands"])
    assert [source for target, source in loaded["file_mounts"].items() if target.endswith("/reelquant")] == ["."]


def test_a_head_without_gpu_and_gpu_workers_that_come_and_go(config: dict[str, Any]) -> None:
    head, workers = config["head_node_type"], set(config["available_node_types"]) - {config["head_node_type"]}
    assert config["available_node_types"][head]["resources"]["GPU"] == 0
    assert workers
    for name in workers:
        node_type = config["available_node_types"][name]
        assert node_type["resources"]["GPU"] >= 1
        assert node_type["min_workers"] == 0 < node_type["max_workers"] <= config["max_workers"]


class TestAutoscaling:
    """Ray's own autoscaler reads the file and says which nodes it would start."""

    @pytest.fixture
    def autoscaling(self, config: dict[str, Any]) -> Any:
        return AutoscalingConfig(config, skip_content_hash=True)  # the files to hash are the user's

    @staticmethod
    def launches(autoscaling: Any, wanted: list[tuple[dict[str, float], int]], *, ranks: int = 1) -> dict[str, int]:
        """Nodes by type for actors that wait, `(resources, number)`, or for placement groups of so many of each."""
        messages: Any = autoscaler_pb2
        logger: Any = logging.getLogger(__name__)
        requests = [(ResourceRequestUtil.make(bundle), number) for bundle, number in wanted]
        single = [messages.ResourceRequestByCount(request=request, count=number) for request, number in requests]
        gangs = [
            messages.GangResourceRequest(requests=[request] * ranks) for request, num in requests for _ in range(num)
        ]
        reply = ResourceDemandScheduler(AutoscalerEventLogger(logger)).schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=autoscaling.get_node_type_configs(),
                max_num_nodes=autoscaling.get_max_num_nodes(),
                idle_timeout_s=autoscaling.get_idle_timeout_s(),
                resource_requests=single if ranks == 1 else [],
                gang_resource_requests=gangs if ranks > 1 else [],
            )
        )
        return {launch.instance_type: launch.count for launch in reply.to_launch}

    def test_nodes_for_the_workers_that_wait_and_no_more_than_allowed(self, autoscaling: Any) -> None:
        worker = {"CPU": 1.0, "GPU": 1.0}
        assert self.launches(autoscaling, []) == {}
        assert self.launches(autoscaling, [(worker, 3)]) == {"gpu": 3}
        assert self.launches(autoscaling, [(worker, 12)]) == {"gpu": 8}
        assert self.launches(autoscaling, [({"CPU": 1.0, "GPU": 0.5}, 3)]) == {"gpu": 2}

    def test_nodes_for_a_replica_or_none(self, autoscaling: Any) -> None:
        worker = {"CPU": 1.0, "GPU": 1.0}
        assert self.launches(autoscaling, [(worker, 1)], ranks=4) == {"gpu": 4}
        assert self.launches(autoscaling, [(worker, 1)], ranks=9) == {}

    def test_a_node_stays_for_longer_than_a_worker_without_work(self, autoscaling: Any) -> None:
        assert autoscaling.get_idle_timeout_s() == 600
        assert autoscaling.get_head_node_type() == "head"


def test_machines_at_hand_are_all_started_and_stay() -> None:
    """Ray's autoscaler does not know what they have, and would start none for a worker that waits."""
    prepared = prepare_config(load(ONPREM))
    [nodes] = prepared["available_node_types"].values()
    assert nodes["min_workers"] == nodes["max_workers"] == len(prepared["provider"]["worker_ips"])


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_the_commands_in_its_head_start_runs_on_the_cluster(path: Path) -> None:
    """On the head nothing but the address says so: without it the head itself, where no GPU is, would be all there is."""
    text = path.read_text().replace("\n#     ", " ")
    [command] = [line for line in text.splitlines() if "python -m pipeline run" in line]
    assert "--set cluster.address=auto" in command
    assert "--set run=/mnt/runs/" in command


def test_nodes_run_the_same_ray(config: dict[str, Any]) -> None:
    assert config["docker"]["image"].startswith(f"rayproject/ray:{ray.__version__}-py311")


def test_the_machines_of_the_onprem_cluster_are_distinct() -> None:
    provider = load(ONPREM)["provider"]
    machines = [provider["head_ip"], *provider["worker_ips"]]
    assert set(provider) == {"type", "head_ip", "worker_ips"}, "Ray does not check the names in this section"
    assert len(set(machines)) == len(machines), "Ray's launcher fails with a bare AssertionError otherwise"


class TestKubeRay:
    """Structure only: no Kubernetes is at hand."""

    @pytest.fixture
    def job(self) -> dict[str, Any]:
        return load(KUBERAY)

    def test_it_is_a_ray_job(self, job: dict[str, Any]) -> None:
        assert (job["apiVersion"], job["kind"], set(job)) == (
            "ray.io/v1", "RayJob", {"apiVersion", "kind", "metadata", "spec"},
        )  # fmt: skip
        cluster = job["spec"]["rayClusterSpec"]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "a map of strings"

    def test_retries_make_new_clusters_and_the_cluster_goes_with_its_job(self, job: dict[str, Any]) -> None:
        spec = job["spec"]
        assert spec["backoffLimit"] >= 1
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["submissionMode"] == "K8sJobMode"
        environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
        assert all(isinstance(value, str) for value in environment.values())
        stop_wait_s = int(environment["RAY_JOB_STOP_WAIT_TIME_S"])
        head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert stop_wait_s >= 30
        assert head["terminationGracePeriodSeconds"] > stop_wait_s

    def test_token_authentication(self, job: dict[str, Any]) -> None:
        assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
        assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_AUTH_MODE"] == "token"

    def test_gpu_workers_that_come_and_go(self, job: dict[str, Any]) -> None:
        cluster = job["spec"]["rayClusterSpec"]
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["version"] == "v2", "says why a worker waits"
        assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 600
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
            [container] = group["template"]["spec"]["containers"]
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            assert resources["limits"]["nvidia.com/gpu"] == "1"

    def test_one_release_of_ray_and_one_volume_for_the_runs(self, job: dict[str, Any]) -> None:
        cluster = job["spec"]["rayClusterSpec"]
        assert cluster["rayVersion"] == ray.__version__
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert volumes["runs"]["persistentVolumeClaim"]
            for container in pod["containers"]:
                assert container["image"].endswith(f"ray{ray.__version__}")
                mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
                assert set(mounts) <= set(volumes)
                assert mounts["runs"] == "/mnt/runs"
