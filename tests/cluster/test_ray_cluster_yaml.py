from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    return loaded


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


def test_ray_would_refuse_a_slip(config: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepare_config(config | {"max_worker": 8}))


def test_a_head_without_gpu_and_gpu_workers_that_come_and_go(config: dict[str, Any]) -> None:
    head, workers = config["head_node_type"], set(config["available_node_types"]) - {config["head_node_type"]}
    assert config["available_node_types"][head]["resources"]["GPU"] == 0
    assert workers
    for name in workers:
        node_type = config["available_node_types"][name]
        assert node_type["resources"]["GPU"] >= 1
        assert node_type["min_workers"] == 0 < node_type["max_workers"] <= config["max_workers"]


def test_every_process_of_every_node_wants_the_token(config: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 /home/ray/.ray/auth_token" in config["setup_commands"]
    assert not any("dashboard-host=0.0.0.0" in command for command in config["head_start_ray_commands"])


def test_nodes_run_the_same_ray_and_install_this_project(config: dict[str, Any]) -> None:
    assert config["docker"]["image"].startswith(f"rayproject/ray:{ray.__version__}-py311")
    assert any("pip install -e '.[application]'" in command for command in config["setup_commands"])
    assert config["file_mounts"]["/home/ray/reelquant"] == "."
