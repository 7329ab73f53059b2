"""Nodes of a cluster that die, freeze and join while the pool is at work. Real daemons, three nodes on one machine."""

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from cluster.actor_pool import Unit, run_units
from cluster.driver_environment import environment, loopback_only
from cluster.session import SessionSettings, ray_session
from cluster.session_directory import session_directory
from tests.cluster.ray_head import QUICK_HEALTH_CHECKS, free_ports
from tests.cluster.sample_workers import SampleWorker, Settings
from tests.cluster.test_actor_pool import Recorder, attempts, doubles

STALL_TIMEOUT_S = 60.0
"""Longer than Ray's health checks take: they say which node is gone. A slow start on a busy machine is no stall."""


class Nodes:
    """A head that takes no work, and the nodes that do."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        port, agent_port = free_ports(2)
        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "gcs_server_port": port, **self._arguments(agent_port)},
        )
        self.address: str = self._cluster.address

    def add(self, num_cpus: int) -> Any:
        """One more node."""
        return self._cluster.add_node(num_cpus=num_cpus, **self._arguments(*free_ports(1)))

    def kill(self, node: Any) -> None:
        """SIGKILL to all processes of a node, as when its power fails."""
        for process in processes_of(node):
            process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def clear(self) -> None:
        """End all nodes but the head."""
        for node in list(self._cluster.worker_nodes):
            self._cluster.remove_node(node, allow_graceful=False)

    def end(self) -> None:
        """End all nodes."""
        self.clear()
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)

    def _arguments(self, agent_port: int) -> dict[str, Any]:
        return {
            "node_ip_address": "127.0.0.1",
            "dashboard_agent_listen_port": agent_port,
            "object_store_memory": 80 * 2**20,
            "temp_dir": str(self._directory / "ray"),
            "include_dashboard": False,
        }


@pytest.fixture(scope="module")
def head() -> Iterator[Nodes]:
    """The head of a cluster that knows a token, for sessions of this process."""
    with session_directory(Path("/tmp")) as directory:
        variables = {
            "HOME": str(directory),
            "RAY_TMPDIR": str(directory),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **QUICK_HEALTH_CHECKS,
        }
        with environment(variables), loopback_only():
            started = Nodes(directory)
            try:
                yield started
            finally:
                started.end()


@pytest.fixture
def nodes(head: Nodes) -> Iterator[Nodes]:
    """The cluster without nodes."""
    yield head
    head.clear()


def processes_of(node: Any) -> list[psutil.Process]:
    """The raylet and all that it has started, workers first."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [*raylet.children(recursive=True), raylet]


def run(nodes: Nodes, units: list[Unit], marks: Path, recorder: Recorder) -> dict[str, Any]:
    settings = SessionSettings(address=nodes.address, working_dir=marks)
    with ray_session(settings):
        return run_units(
            SampleWorker, Settings(marks), units, num_workers=2, num_cpus=1, stall_timeout_s=STALL_TIMEOUT_S,
            progress_interval_s=0.1, events=recorder,
        )  # fmt: skip


def once_both_work(recorder: Recorder, marks: Path, action: Callable[[], None]) -> None:
    """Does `action` when both victims have begun, and then lets the units end."""

    def act(name: str) -> None:
        if not (marks / "go").exists() and attempts(marks, "victim-0") and attempts(marks, "victim-1"):
            action()
            (marks / "go").touch()

    recorder.when["progress"] = act


VICTIMS = [Unit(f"victim-{index}", ("wait", f"victim-{index}")) for index in range(2)]
"""Each waits for the file `go`; a second attempt finds it there."""


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    # The workers import `tests` from the checkout; what is sent to the nodes is an empty folder.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    return folder


def test_a_node_that_dies_costs_its_units_one_attempt(marks: Path, nodes: Nodes) -> None:
    nodes.add(1)
    second = nodes.add(1)
    recorder = Recorder()
    once_both_work(recorder, marks, lambda: nodes.kill(second))
    results = run(nodes, [*VICTIMS, *doubles(4)], marks, recorder)
    assert [results[f"double-{index}"] for index in range(4)] == [0, 2, 4, 6]
    assert sorted(results[f"victim-{index}"] for index in range(2)) == [1, 2]
    [(name, attempt, error, will_retry)] = recorder.of("failed")
    assert (attempt, will_retry) == (1, True)
    assert name.startswith("victim")
    assert "Actor" in error


def test_a_node_that_freezes_counts_as_dead(marks: Path, nodes: Nodes) -> None:
    """All its processes stopped: for the others the same as a network that is cut."""
    nodes.add(1)
    second = nodes.add(1)
    frozen: list[psutil.Process] = []

    def freeze() -> None:
        frozen.extend(processes_of(second))
        for process in frozen:
            os.kill(process.pid, signal.SIGSTOP)

    recorder = Recorder()
    once_both_work(recorder, marks, freeze)
    try:
        results = run(nodes, [*VICTIMS, *doubles(4)], marks, recorder)
    finally:
        for process in frozen:
            process.kill()
    assert sorted(results[f"victim-{index}"] for index in range(2)) == [1, 2]
    assert len(results) == 6
    assert [(attempt, will_retry) for _, attempt, _, will_retry in recorder.of("failed")] == [(1, True)]


def test_a_node_that_joins_late_gets_work(marks: Path, nodes: Nodes) -> None:
    nodes.add(1)
    late: list[Any] = []

    def join(name: str) -> None:
        if not late:
            late.append(nodes.add(1))

    recorder = Recorder({"progress": join})
    # Each waits until another worker has one.
    meetings = [Unit(f"meet-{index}", ("meet", f"meet-{index}", 2, "meet")) for index in range(2)]
    assert run(nodes, meetings, marks, recorder) == {"meet-0": 2, "meet-1": 2}
    assert recorder.of("failed") == []
    assert {worker for _, worker in recorder.of("started")} == {"worker-0", "worker-1"}
