"""The cluster files that ship: accepted by Ray or of the shape that KubeRay wants, and none of them open to strangers."""

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ROOT / "configs" / "clusters"
ONPREM, KUBERAY = CLUSTERS / "onprem.yaml", CLUSTERS / "kuberay.yaml"
LAUNCHER = [ROOT / "ray_cluster.yaml", ONPREM]
"""For Ray's own cluster launcher."""

KUBERAY_FIELDS: dict[str, set[str]] = {
    "RayJob": {
        "activeDeadlineSeconds", "backoffLimit", "entrypoint", "entrypointNumCpus", "metadata", "rayClusterSpec",
        "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate",
        "ttlSecondsAfterFinished",
    },
    "RayCluster": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec", "rayVersion", "workerGroupSpecs",
    },
    "autoscaler": {"idleTimeoutSeconds", "upscalingMode", "resources", "env"},
    "head": {"rayStartParams", "template", "serviceType"},
    "workers": {"groupName", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas", "template"},
    "pod": {"containers", "terminationGracePeriodSeconds", "tolerations", "nodeSelector", "volumes"},
    "container": {"env", "image", "name", "ports", "resources", "volumeMounts"},
}  # fmt: skip
"""Names in KubeRay's ray.io/v1 types that these files may use; Kubernetes drops a misspelt field without a word."""


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
    with pytest.raises(Exception, match="Additional properties are not allowed"):
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

    def test_names_of_all_fields(self, job: dict[str, Any]) -> None:
        assert (job["apiVersion"], job["kind"], set(job)) == (
            "ray.io/v1", "RayJob", {"apiVersion", "kind", "metadata", "spec"},
        )  # fmt: skip
        cluster = job["spec"]["rayClusterSpec"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        pods = [group["template"]["spec"] for group in groups]
        for kind, found in [
            ("RayJob", job["spec"]),
            ("RayCluster", cluster),
            ("autoscaler", cluster["autoscalerOptions"]),
            ("head", groups[0]),
            *[("workers", group) for group in groups[1:]],
            *[("pod", pod) for pod in pods],
            *[("container", container) for pod in pods for container in pod["containers"]],
        ]:
            assert set(found) <= KUBERAY_FIELDS[kind], kind
        for group in groups:
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
