"""A rank of a replica runs out of memory, for real, while the other one waits for it."""

import json
from pathlib import Path

import psutil
import pytest

from cluster.actor_pool import Unit, UnitsFailed, run_units
from cluster.session import SessionSettings, ray_session
from tests.errors import names
from tests.unit_cache import UnitCache
from tests.workers.limited_replica import LimitedReplica, apply, make_layers
from tests.workers.memory_limit import LIMITS
from tests.workers.test_out_of_memory import EXACT_MALLOC, Recorder
from workers.shared_worker import SharedUnit, SharedWorker

SHORT = 96
"""MiB: enough for one activation, not for the two that a layer needs."""


@pytest.mark.ray
@pytest.mark.slow
def test_a_rank_out_of_memory_costs_its_replica_and_its_unit_is_done_by_new_processes_or_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**EXACT_MALLOC, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(LIMITS, json.dumps({"in pieces": (None, SHORT), "hopeless": (SHORT, SHORT)}))
    started, recorder = tmp_path / "started", Recorder()
    started.mkdir()
    cache = UnitCache(tmp_path / "run")
    units = [
        Unit(
            name,
            SharedUnit(
                LimitedReplica, started, name, cache.address("trajectories", "u"), f"trajectories/{name}", 700 * 2**20
            ),
        )
        for name in ("a", "b", "c", "in pieces", "d", "hopeless", "e")
    ]
    with ray_session(SessionSettings(num_cpus=2)), pytest.raises(UnitsFailed) as caught:
        run_units(SharedWorker, None, units, num_workers=1, num_ranks=2, stall_timeout_s=120.0, events=recorder)

    alone = "ended with its replica, whose worker-0.1 failed"
    told = {name: [event.split(":")[0] for event in events] for name, events in recorder.events.items()}
    assert told == {
        "a": ["1 done"], "b": ["1 done"],
        "c": [f"1 {alone}", "2 done"], "in pieces": ["1 out of memory, again", "2 done"],
        "d": [f"1 {alone}", "2 done"], "hopeless": ["1 out of memory, again", "2 out of memory"],
        "e": ["1 done"],
    }  # fmt: skip
    results = caught.value.results
    layers = make_layers()
    assert {name: output.result["sum"] for name, output in results.items()} == {
        unit.name: apply(layers.__getitem__, unit.name, lambda *_: None) for unit in units if unit.name != "hopeless"
    }
    assert results["a"].device != results["in pieces"].device != results["e"].device, "by new processes"
    ranks = [path.name.split(".") for path in started.iterdir()]
    assert sorted(rank for _, rank in ranks) == ["0", "0", "0", "0", "1", "1", "1", "1"], "all ranks are new each time"
    assert not [pid for pid, _ in ranks if psutil.pid_exists(int(pid))]

    assert caught.value.failures.keys() == {"hopeless"}
    sizes, ways_out = ("64.0 MiB", "700.0 MiB"), ("workers.gpus_per_replica", "generation.height")
    assert names(
        caught.value.failures["hopeless"].error, "trajectories/hopeless", "rank 1 of 2", "cpu", *sizes, *ways_out
    )
