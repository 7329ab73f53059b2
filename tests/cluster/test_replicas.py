"""Workers of several ranks: who does what, and that they live and die together."""

import os
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.actor_pool import Unit, UnitsFailed, WorkersFailed, run_units
from tests.cluster.joining_rank import JoiningRank
from tests.cluster.sample_replicas import RankOrAlone, SampleReplica
from tests.cluster.sample_workers import Settings
from tests.cluster.test_actor_pool import Recorder, attempts, living_workers
from tests.errors import raises

pytestmark = pytest.mark.usefixtures("session")


def run(units: list[Unit], marks: Path, **arguments: Any) -> dict[str, Any]:
    defaults = {"num_workers": 1, "num_ranks": 2, "num_cpus": 0.5, "stall_timeout_s": 60.0, "progress_interval_s": 0.05}
    return run_units(SampleReplica, Settings(marks, arguments.pop("fail_start", "")), units, **defaults | arguments)


def silence_s(idle: float) -> float:
    """Silence that counts as death: on an idle machine, and longer in proportion on one that is busy now."""
    return idle * max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


def together(*names: str, affinity: str = "") -> list[Unit]:
    return [Unit(name, ("together", name), affinity) for name in names]


def test_a_round_has_a_unit_a_rank_and_shadows_for_the_rest(tmp_path: Path) -> None:
    recorder = Recorder()
    results = run(together("a", "b", "c", "d", "e"), tmp_path, num_ranks=3, events=recorder)
    ranks = {"a": 0, "b": 1, "c": 2, "d": 0, "e": 1}
    assert results == {name: (name, rank) for name, rank in ranks.items()}
    assert list(results) == list(ranks)
    assert recorder.of("started") == [(name, f"worker-0.{rank}") for name, rank in ranks.items()]
    assert attempts(tmp_path, "shadow-d") == 1
    assert attempts(tmp_path, "start") == 3
    assert living_workers(tmp_path) == []


def test_units_of_different_affinity_share_no_round(tmp_path: Path) -> None:
    results = run([*together("a", affinity="x"), *together("b", "c", affinity="y")], tmp_path)
    assert {name: rank for name, (_, rank) in results.items()} == {"a": 0, "b": 0, "c": 1}


@pytest.mark.parametrize(("how", "victim"), [("runtime", 0), ("SIGKILL", 1), ("SIGSTOP", 0)])
def test_a_rank_that_fails_ends_all_and_each_unit_is_tried_again_alone(how: str, victim: int, tmp_path: Path) -> None:
    recorder = Recorder()
    units = together("a", "b", "c", "d")
    units[victim] = Unit("victim", ("fail_first", "victim", how))
    limit = silence_s(1.5) if how == "SIGSTOP" else 60.0
    results = run(units, tmp_path, stall_timeout_s=limit, events=recorder)
    names = [unit.name for unit in units]
    assert list(results) == names
    started = [name for name, _ in recorder.of("started")]
    assert [started.count(name) for name in names] == [2, 2, 1, 1]
    assert {name for name, *_ in recorder.of("failed")} == set(names[:2])
    assert all(attempt == 1 and will_retry for _, attempt, _, will_retry in recorder.of("failed"))
    assert attempts(tmp_path, "start") == 4, "both ranks are new"
    assert all(attempts(tmp_path, f"shadow-{name}") == 1 for name in names[:2]), "each was alone"
    assert living_workers(tmp_path) == []


def test_a_poison_unit_takes_no_other_with_it(tmp_path: Path) -> None:
    units = [*together("a"), Unit("poison", ("exit", "poison")), *together("b", "c")]
    with raises(UnitsFailed, "1 of 4", "poison") as caught:
        run(units, tmp_path)
    assert list(caught.value.results) == ["a", "b", "c"]
    assert caught.value.failures["poison"].attempts == attempts(tmp_path, "poison") == 3
    assert [attempts(tmp_path, name) for name in "bc"] == [1, 1]


def test_a_value_error_is_not_retried_but_its_replica_is_made_anew(tmp_path: Path) -> None:
    recorder = Recorder()
    units = [*together("a"), Unit("bad", ("raise", "bad", "value"))]
    with raises(UnitsFailed, "ValueError: bad luck in bad") as caught:
        run(units, tmp_path, max_attempts=1, events=recorder)
    assert caught.value.failures["bad"].attempts == attempts(tmp_path, "bad") == 1
    assert list(caught.value.results) == ["a"], "not set aside for what another rank has done"
    assert attempts(tmp_path, "start") == 4


def test_an_outcome_that_has_come_in_stays(tmp_path: Path) -> None:
    meet_late = Unit("victim", ("fail_first", "victim", "sleep"))
    early = Unit("early", ("double", "early", 4))  # does not wait for its replica
    assert run([early, meet_late], tmp_path, stall_timeout_s=silence_s(1.5))["early"] == 8
    assert attempts(tmp_path, "early") == 1


def test_ranks_are_told_their_place_and_have_a_gpu_each(tmp_path: Path) -> None:
    units = [Unit(name, ("environment",)) for name in "ab"]
    first, second = run(units, tmp_path, num_gpus=1).values()
    assert [rank["RANK"] for rank in (first, second)] == ["0", "1"]
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in (first, second)} == {"0", "1"}
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        assert first[name] == second[name] == value
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert [group["state"] for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"] == []


def test_nobody_can_take_the_port_before_the_ranks_meet_there() -> None:
    units = [Unit(str(index), index) for index in range(3)]
    results = run_units(JoiningRank, None, units, num_workers=1, num_ranks=2, num_cpus=0.5, stall_timeout_s=120.0)
    held = "EADDRINUSE"
    assert results == {"0": (held, [0, 1]), "1": (held, [0, 1]), "2": (held, [2, 2])}


def test_several_replicas_work_at_once(tmp_path: Path) -> None:
    recorder = Recorder()
    units = [Unit(f"meet-{index}", ("meet", f"meet-{index}", 4)) for index in range(6)]
    results = run(units, tmp_path, num_workers=9, num_cpus=1, events=recorder)
    assert len(results) == 6, "each waits until two replicas are there"
    assert attempts(tmp_path, "start") == 4, "four CPUs hold no more"
    assert {worker for _, worker in recorder.of("started")} <= {f"worker-{i}.{rank}" for i in (0, 1) for rank in (0, 1)}


def test_a_replica_too_large_for_the_session_is_refused_at_once(tmp_path: Path) -> None:
    with raises(ValueError, "3 ranks", "0.5 CPUs", "1 GPU", "4 CPUs", "2 GPUs"):
        run(together("a"), tmp_path, num_ranks=3, num_gpus=1)


def test_a_replica_that_cannot_start(tmp_path: Path) -> None:
    with raises(WorkersFailed, "ValueError: no such model"):
        run(together("a"), tmp_path, fail_start="value")
    assert living_workers(tmp_path) == []


def test_replicas_and_single_processes_share_the_room_by_priority(tmp_path: Path) -> None:
    at_work: dict[str, str] = {}
    kinds: list[set[bool]] = []

    class Watched(Recorder):
        def started(self, name: str, worker: str) -> None:
            super().started(name, worker)
            at_work[name] = worker
            kinds.append({"." in busy for busy in at_work.values()})

        def finished(self, name: str, result: Any, seconds: float, attempt: int) -> None:
            at_work.pop(name)

    recorder = Watched()
    units = [
        *(Unit(name, ("together", name), priority=2) for name in "ab"),
        *(Unit(name, ("double", name, 1), priority=1, single=True) for name in "cd"),
        Unit("e", ("together", "e"), priority=0),
    ]
    results = run_units(
        RankOrAlone, Settings(tmp_path), units, num_workers=1, num_ranks=2, num_cpus=0.5, stall_timeout_s=60.0,
        events=recorder,
    )  # fmt: skip
    assert results == {"a": ("a", 0), "b": ("b", 1), "c": 2, "d": 2, "e": ("e", 0)}
    started = [name for name, _ in recorder.of("started")]
    assert started[0] == "e"
    assert sorted(started[1:3]) == ["c", "d"]
    assert sorted(started[3:]) == ["a", "b"]
    assert all(len(found) == 1 for found in kinds), "a replica makes room for single processes, and they for it"
    assert living_workers(tmp_path) == []
