"""A cluster that grows and shrinks with a pool's work: Ray's own autoscaler, real daemons, a head without room for workers."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private import worker as ray_driver
from ray.core.generated import autoscaler_pb2

from cluster.actor_pool import Unit, WorkersFailed, run_units
from cluster.driver_environment import environment, loopback_only
from cluster.session import SessionSettings, ray_session
from tests.cluster.autoscaling_head import AutoscalingHead, autoscaling_head
from tests.cluster.no_machines import NoMachines
from tests.cluster.sample_replicas import SampleReplica
from tests.cluster.sample_workers import SampleWorker, Settings
from tests.cluster.test_actor_pool import Recorder, attempts, doubles
from tests.errors import names, raises

GPU_NODES = {"gpu": {"resources": {"CPU": 1, "GPU": 1}, "max_workers": 3}}


class Watcher(Recorder):
    """Remembers what the pool waited for, too."""

    def __init__(self, when: dict[str, Callable[[str], None]] | None = None) -> None:
        super().__init__(when)
        self.told: list[str] = []

    def waiting(self, description: str) -> None:
        self.told.append(description)


@pytest.fixture(scope="module")
def head() -> Iterator[AutoscalingHead]:
    """A cluster of no nodes, up to three, that knows a token."""
    with autoscaling_head(GPU_NODES) as started:
        yield started


@pytest.fixture(autouse=True)
def early_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoscaler, which works every second here, is asked as often, and believed after 3 s in place of a minute."""
    monkeypatch.setattr("cluster.placement_watch._NOTICE_S", 1.0)
    monkeypatch.setattr("cluster.placement_watch._INFEASIBLE_S", 3.0)


@pytest.fixture
def marks(head: AutoscalingHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the workers of a session in the cluster. In the end, all nodes that came have left."""
    with session_in(head, tmp_path, monkeypatch) as folder:
        yield folder


@contextlib.contextmanager
def session_in(head: AutoscalingHead, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Path]:
    # The workers import `tests` from the checkout; what is sent to the nodes is an empty folder.
    (folder / "empty").mkdir()
    patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    variables = {name: head.environment[name] for name in ("HOME", "RAY_TMPDIR", "RAY_AUTH_MODE")}
    settings = SessionSettings(address=head.address, working_dir=folder / "empty")
    with environment(variables), loopback_only(), ray_session(settings) as session:
        assert (session.num_cpus, session.num_gpus, head.raylets()) == (0, 0, [])
        yield folder
        wait_until(lambda: demand() == [], 120)
        wait_until(lambda: head.raylets() == [] and "GPU" not in ray.cluster_resources(), 120)


def demand() -> list[Any]:
    """What the autoscaler would start nodes for, one entry each."""
    driver: Any = ray_driver
    messages: Any = autoscaler_pb2
    reply = messages.GetClusterStatusReply()
    reply.ParseFromString(driver.global_worker.gcs_client.get_cluster_status(timeout_s=60))
    state = reply.cluster_resource_state
    single = [request for request in state.pending_resource_requests for _ in range(request.count)]
    return [*single, *state.pending_gang_resource_requests]


def run(worker: Any, units: list[Unit], marks: Path, **arguments: Any) -> dict[str, Any]:
    defaults = {"num_cpus": 1, "num_gpus": 1, "stall_timeout_s": 60.0, "progress_interval_s": 0.1}
    return run_units(worker, Settings(marks), units, **defaults | arguments)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def meetings(num: int) -> list[Unit]:
    """Each waits until so many workers are there."""
    return [Unit(f"meet-{index}", ("meet", f"meet-{index}", num)) for index in range(num)]


def test_nodes_come_with_the_work_and_leave_when_it_is_done(head: AutoscalingHead, marks: Path) -> None:
    nodes: list[int] = []
    watcher = Watcher({"finished": lambda name: nodes.append(len(head.raylets()))})
    results = run(SampleWorker, [*meetings(2), *doubles(6)], marks, num_workers=2, events=watcher)
    assert len(results) == 8
    assert watcher.of("failed") == []
    assert attempts(marks, "start") == 2
    assert max(nodes) >= 2


def test_a_replica_gets_a_node_for_each_rank(head: AutoscalingHead, marks: Path) -> None:
    units = [Unit(name, ("together", name)) for name in "abcd"]
    results = run(SampleReplica, units, marks, num_workers=1, num_ranks=2)
    assert results == {"a": ("a", 0), "b": ("b", 1), "c": ("c", 0), "d": ("d", 1)}
    assert len(head.raylets()) == 2


def test_a_node_taken_away_in_between_costs_its_units_one_attempt(head: AutoscalingHead, marks: Path) -> None:
    taken: list[psutil.Process] = []

    def take_away(name: str) -> None:
        if not taken and attempts(marks, "victim-0") and attempts(marks, "victim-1"):
            taken.append(head.raylets()[-1])
            head.take_away(taken[0])
            (marks / "go").touch()

    watcher = Watcher({"progress": take_away})
    units = [*(Unit(f"victim-{index}", ("wait", f"victim-{index}")) for index in range(2)), *doubles(4)]
    results = run(SampleWorker, units, marks, num_workers=2, events=watcher)
    assert sorted(results[f"victim-{index}"] for index in range(2)) == [1, 2]
    assert [results[f"double-{index}"] for index in range(4)] == [0, 2, 4, 6]
    assert [(attempt, will_retry) for _, attempt, _, will_retry in watcher.of("failed")] == [(1, True)]


def test_nodes_leave_and_demand_is_withdrawn_while_the_last_unit_is_at_work(head: AutoscalingHead, marks: Path) -> None:
    """Five workers are wanted and three nodes may come: two workers wait, as long as there are units for them."""
    demanded: list[int] = []
    deadline = time.monotonic() + 200

    def look(name: str) -> None:
        assert time.monotonic() < deadline, demanded
        if (now := len(demand())) not in demanded[-1:]:
            demanded.append(now)
        if attempts(marks, "double-0") and now == 0 and len(head.raylets()) == 1:
            (marks / "go").touch()

    watcher = Watcher({"progress": look})
    steps = [Unit(f"steps-{num}-{index}", ("steps", num, 0.1)) for index, num in enumerate([80, 20, 80])]
    units = [Unit("last", ("wait", "last")), *steps, *doubles(1)]
    assert len(run(SampleWorker, units, marks, num_workers=5, idle_timeout_s=1, events=watcher)) == 5
    assert demanded[-3:] == [2, 1, 0]
    assert watcher.of("failed") == []


def test_what_no_node_can_hold_is_an_error_before_the_long_wait_ends(head: AutoscalingHead, marks: Path) -> None:
    watcher = Watcher()
    with raises(WorkersFailed, "2 workers", "2 GPUs", "max_workers") as caught:
        run(SampleWorker, doubles(3), marks, num_workers=2, num_gpus=2, placement_timeout_s=200, events=watcher)
    told = watcher.told[-1]
    assert names(told, "2 workers", "1 CPU", "2 GPUs", "1 node", "0 CPUs", "0 GPUs")
    assert told in str(caught.value)


def test_a_replica_larger_than_the_largest_cluster_is_an_error(head: AutoscalingHead, marks: Path) -> None:
    with raises(WorkersFailed, "1 worker", "4 ranks", "1 GPU", "max_workers"):
        run(SampleReplica, doubles(4), marks, num_workers=1, num_ranks=4, placement_timeout_s=200)


def test_a_cloud_without_machines_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher()
    with (
        autoscaling_head(GPU_NODES, provider=f"{NoMachines.__module__}.{NoMachines.__name__}") as head,
        session_in(head, tmp_path, monkeypatch) as marks,
    ):
        with raises(WorkersFailed, "10 s", "1 worker", "placement_timeout_s"):
            run(SampleWorker, doubles(1), marks, num_workers=1, placement_timeout_s=10, events=watcher)
        log = (head.directory / "ray" / "session_latest" / "logs" / "monitor.log").read_text()
    assert names(watcher.told[-1], "monitor.log")
    assert "InsufficientInstanceCapacity" in log


@pytest.mark.slow
def test_the_autoscaler_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with autoscaling_head(GPU_NODES, version=1) as head, session_in(head, tmp_path, monkeypatch) as marks:
        assert len(run(SampleWorker, meetings(2), marks, num_workers=2)) == 2
        assert len(head.raylets()) >= 2, "this version may start one too many"
