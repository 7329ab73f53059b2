import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.actor_pool import PoolEvents, Unit, UnitsFailed, WorkersFailed, run_units
from cluster.placement_watch import _wanted
from cluster.session import Session
from cluster.units import headline
from cluster.worker_slot import WorkerRecipe, WorkerSlot
from tests.cluster.sample_workers import PreparingSample, SampleWorker, Settings
from tests.errors import names, raises

pytestmark = pytest.mark.usefixtures("session")


class Recorder(PoolEvents):
    """Remembers every event."""

    def __init__(self, when: dict[str, Callable[[str], None]] | None = None) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.out_of_memory: list[bool] = []
        """Of every failed attempt."""
        self.when = when or {}

    def started(self, name: str, worker: str) -> None:
        self.events.append(("started", name, worker))

    def progress(self, name: str, done: int, total: int) -> None:
        self.events.append(("progress", name, done, total))
        if "progress" in self.when:
            self.when["progress"](name)

    def finished(self, name: str, result: Any, seconds: float, attempt: int) -> None:
        self.events.append(("finished", name, result, seconds, attempt))
        if "finished" in self.when:
            self.when["finished"](name)

    def failed(self, name: str, attempt: int, error: str, will_retry: bool, *, out_of_memory: bool = False) -> None:
        self.out_of_memory.append(out_of_memory)
        self.events.append(("failed", name, attempt, error, will_retry))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == kind]


def doubles(num_units: int) -> list[Unit]:
    return [Unit(f"double-{index}", ("double", f"double-{index}", index)) for index in range(num_units)]


def attempts(marks: Path, name: str) -> int:
    return len(list(marks.glob(f"{name}.*")))


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def living_workers(marks: Path) -> list[int]:
    """Process ids, of all workers ever constructed with `marks`, that still run."""
    return [pid for path in marks.glob("start.*") if is_alive(pid := int(path.suffix[1:]))]


def was_silent(marks: Path, limit_s: float) -> bool:
    """Whether the machine was so busy that a worker which reports all the time was not heard for half of the limit."""
    told = (marks / "silence").read_text().split()
    return max(map(float, told)) > limit_s / 2


def run(units: list[Unit], marks: Path, **arguments: Any) -> dict[str, Any]:
    arguments = {"num_workers": 2, "num_cpus": 0.5, "stall_timeout_s": 30.0, "progress_interval_s": 0.05} | arguments
    return run_units(SampleWorker, Settings(marks, arguments.pop("fail_start", "")), units, **arguments)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_of_all_units_in_order_whatever_the_number_of_workers(num_workers: int, tmp_path: Path) -> None:
    recorder = Recorder()
    meetings = [Unit(f"meet-{index}", ("meet", f"meet-{index}", num_workers, "meet")) for index in range(num_workers)]
    results = run([*meetings, *doubles(7)], tmp_path, num_workers=num_workers, events=recorder)
    expected = dict.fromkeys((unit.name for unit in meetings), num_workers)
    expected |= {f"double-{index}": 2 * index for index in range(7)}
    assert list(results.items()) == list(expected.items())
    assert attempts(tmp_path, "start") == num_workers
    assert {worker for _, worker in recorder.of("started")} == {f"worker-{index}" for index in range(num_workers)}
    assert sorted(name for name, *_ in recorder.of("finished")) == sorted(results)
    assert all(attempt == 1 and seconds >= 0 for _, _, seconds, attempt in recorder.of("finished"))
    assert living_workers(tmp_path) == []


def test_a_worker_does_units_of_one_affinity_in_a_row(tmp_path: Path) -> None:
    recorder = Recorder()
    units = [Unit(f"double-{i}", ("double", f"double-{i}", i), affinity="ab"[i % 2]) for i in range(6)]
    assert list(run(units, tmp_path, num_workers=1, events=recorder)) == [unit.name for unit in units]
    assert [name for name, _ in recorder.of("started")] == [f"double-{i}" for i in (0, 2, 4, 1, 3, 5)]


def test_the_first_priority_goes_before_affinity(tmp_path: Path) -> None:
    recorder = Recorder()
    units = [
        Unit(f"double-{i}", ("double", f"double-{i}", i), affinity="ab"[i % 2], priority=-(i // 2)) for i in range(6)
    ]
    run(units, tmp_path, num_workers=1, events=recorder)
    assert [name for name, _ in recorder.of("started")] == [f"double-{i}" for i in (4, 5, 3, 2, 0, 1)]


class Chain(Recorder):
    """Every unit that ends releases the next one, which joins those under way."""

    def __init__(self, units: list[Unit]) -> None:
        super().__init__()
        self.units = units

    def released(self) -> list[Unit]:
        return [self.units.pop(0)] if self.units else []


def test_units_released_by_others_join_the_pool_and_bring_workers_along(tmp_path: Path) -> None:
    chain = Chain([Unit("bad", ("raise", "bad", "value")), Unit("slow", ("wait", "slow")), *doubles(2)])
    # Waits for the second worker, which the units that "first" releases keep from being one too many.
    first = [Unit("first", ("double", "first", 1)), Unit("go", ("meet", "go", 2))]
    chain.units.append(Unit("meet", ("meet", "meet", 2)))
    (tmp_path / "go").touch()
    with raises(UnitsFailed, "1 of 7", "bad") as caught:
        run(first, tmp_path, events=chain)
    assert list(caught.value.results) == ["first", "go", "slow", "double-0", "double-1", "meet"]
    assert [attempts(tmp_path, name) for name in ("first", "bad", "slow", "meet")] == [1] * 4


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_prepares_the_unit_that_it_gets_next(num_workers: int, tmp_path: Path) -> None:
    units = [Unit(f"unit-{i}", ("prepared", f"unit-{i}"), prepared=True) for i in range(8)]
    results = run_units(
        PreparingSample, Settings(tmp_path), units, num_workers=num_workers, num_cpus=0.5, stall_timeout_s=30.0
    )
    assert list(results) == [unit.name for unit in units]
    # The last one may be taken from a worker that is still at work.
    assert sum(results.values()) >= 8 - 2 * num_workers + 1


def test_a_worker_with_nothing_to_do_leaves(tmp_path: Path) -> None:
    numbers: list[int] = []

    def look(name: str) -> None:
        numbers.append(len(living_workers(tmp_path)))
        if attempts(tmp_path, "start") == 2 and numbers[-1] == 1:  # its GPU is free for others
            (tmp_path / "go").touch()

    units = [Unit("meet", ("meet", "meet", 2)), Unit("last", ("wait", "last"))]
    assert run(units, tmp_path, idle_timeout_s=0.3, events=Recorder({"progress": look})) == {"meet": 2, "last": 1}


def test_no_more_workers_than_units(tmp_path: Path) -> None:
    assert run(doubles(1), tmp_path, num_workers=50) == {"double-0": 0}
    assert attempts(tmp_path, "start") == 1


def test_no_units(tmp_path: Path) -> None:
    assert run([], tmp_path) == {}


def test_a_worker_killed_in_a_unit_costs_that_unit_alone(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_once(name: str) -> None:
        if not killed:
            killed.append(int(next(tmp_path.glob("victim.*")).name.split(".")[1]))
            os.kill(killed[0], signal.SIGKILL)
            (tmp_path / "go").touch()

    recorder = Recorder({"progress": kill_once})
    results = run([Unit("victim", ("wait", "victim")), *doubles(5)], tmp_path, events=recorder)
    assert results["victim"] == 2
    assert [attempts(tmp_path, f"double-{index}") for index in range(5)] == [1] * 5
    [(name, attempt, error, will_retry)] = recorder.of("failed")
    assert (name, attempt, will_retry) == ("victim", 1, True)
    assert "ActorDiedError" in error
    last_pid = max(tmp_path.glob("victim.*"), key=lambda path: int(path.name.split(".")[2])).name.split(".")[1]
    assert int(last_pid) != killed[0]


def test_a_poison_unit_is_set_aside_and_the_others_finish(tmp_path: Path) -> None:
    recorder = Recorder()
    with raises(UnitsFailed, "1 of 7", "poison") as caught:
        run([Unit("poison", ("exit", "poison")), *doubles(6)], tmp_path, events=recorder)
    assert caught.value.results == {f"double-{index}": 2 * index for index in range(6)}
    assert caught.value.failures["poison"].attempts == attempts(tmp_path, "poison") == 3
    assert "the last word of poison" in caught.value.details()
    assert [attempts(tmp_path, f"double-{index}") for index in range(6)] == [1] * 6
    assert [(attempt, will_retry) for _, attempt, _, will_retry in recorder.of("failed")] == [
        (1, True),
        (2, True),
        (3, False),
    ]


def test_a_value_error_is_not_retried_and_comes_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(UnitsFailed) as caught:
        run([Unit("bad", ("raise", "bad", "value")), *doubles(2)], tmp_path, num_workers=1)
    assert attempts(tmp_path, "bad") == 1
    assert attempts(tmp_path, "start") == 1, "the process is as good as before"
    error = caught.value.failures["bad"].error
    assert "in do_raise" in error
    assert headline(error) == "ValueError: bad luck in bad"
    assert headline(error) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert error.rstrip() in caught.value.details()
    assert caught.value.results == {"double-0": 0, "double-1": 2}


@pytest.mark.parametrize(("how", "reason"), [("SIGKILL", "SIGKILL"), ("crash", "Aborted"), ("exit", "exit code 3")])
def test_the_reason_of_a_death_is_its_headline_and_never_a_progress_bar(how: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnitsFailed) as caught:
        run([Unit("victim", ("die", "victim", how))], tmp_path, max_attempts=1)
    error = caught.value.failures["victim"].error
    assert reason in headline(error)
    assert "ActorDiedError" in error, "Ray's own words are kept"
    assert "Loading pipeline" not in error + str(caught.value)


def test_a_full_disk_is_not_tried_again_and_comes_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnitsFailed) as caught:
        run([Unit("big", ("fill_the_disk", "big")), *doubles(1)], tmp_path, max_attempts=3)
    assert attempts(tmp_path, "big") == 1
    error = caught.value.failures["big"].error
    assert headline(error) == "RuntimeError: big could not be written: no room"
    assert "Errno 28" in error


def test_another_exception_is_retried_in_a_new_process(tmp_path: Path) -> None:
    with raises(UnitsFailed, "RuntimeError: bad luck in bad"):
        run([Unit("bad", ("raise", "bad", "runtime"))], tmp_path, max_attempts=2)
    pids = {path.name.split(".")[1] for path in tmp_path.glob("bad.*")}
    assert len(pids) == 2


def test_the_same_error_twice_is_not_tried_again_but_another_or_the_machines_is(tmp_path: Path) -> None:
    units = [
        Unit("same", ("raise", "same", "runtime")),
        Unit("anew", ("raise_anew", "anew")),
        Unit("disk", ("raise", "disk", "os")),
    ]
    with pytest.raises(UnitsFailed) as caught:
        run(units, tmp_path, max_attempts=3)
    assert {name: failure.attempts for name, failure in caught.value.failures.items()} == {
        "same": 2, "anew": 3, "disk": 3,
    }  # fmt: skip
    assert {name: attempts(tmp_path, name) for name in caught.value.failures} == {"same": 2, "anew": 3, "disk": 3}


def marked_pids(marks: Path, name: str) -> list[str]:
    """Processes that did attempts at a unit, in order."""
    paths = sorted(marks.glob(f"{name}.*"), key=lambda path: int(path.name.split(".")[2]))
    return [path.name.split(".")[1] for path in paths]


def test_a_unit_out_of_memory_is_tried_in_its_process_told_to_save_then_in_a_new_one_then_set_aside(
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    units = [Unit("meet-0", ("meet", "meet-0", 2)), Unit("meet-1", ("meet", "meet-1", 2))]
    units += [Unit("poison", ("too_much", "poison")), *doubles(6), Unit("last", ("lean", "last"))]
    with raises(UnitsFailed, "poison", "MemoryError") as caught:
        run(units, tmp_path, max_attempts=9, events=recorder)
    assert caught.value.failures.keys() == {"poison"}
    first, second, third = marked_pids(tmp_path, "poison")
    assert first == second != third, "in the process that is told to save memory, then in another"
    others = {pid for unit in units if unit.name != "poison" for pid in marked_pids(tmp_path, unit.name)}
    before = [path for path in tmp_path.glob(f"*.{third}.*") if not path.name.startswith("poison")]
    poison = max(int(path.name.split(".")[2]) for path in tmp_path.glob("poison.*"))
    assert [path for path in before if int(path.name.split(".")[2]) < poison] == [], f"a new process, none of {others}"
    assert [(name, attempt, again) for name, attempt, _, again in recorder.of("failed") if name == "poison"] == [
        ("poison", 1, True), ("poison", 2, True), ("poison", 3, False),
    ]  # fmt: skip
    assert all(recorder.out_of_memory)
    assert caught.value.results["last"] is True
    assert attempts(tmp_path, "last") == 2


def test_attempts_out_of_memory_count(tmp_path: Path) -> None:
    with raises(UnitsFailed, "poison", "MemoryError") as caught:
        run([Unit("poison", ("too_much", "poison"))], tmp_path, max_attempts=2)
    assert caught.value.failures["poison"].attempts == 2
    assert len(set(marked_pids(tmp_path, "poison"))) == 1


def test_a_result_that_cannot_be_sent_is_an_error_of_its_unit(tmp_path: Path) -> None:
    with raises(UnitsFailed, "kept", "this result stays here"):
        run([Unit("kept", ("unpicklable",)), *doubles(1)], tmp_path, max_attempts=1)


def test_stalled_workers_are_killed_and_their_units_retried(tmp_path: Path) -> None:
    recorder = Recorder()
    ways = ["sleep", "holding the GIL", "SIGSTOP"]
    units = [Unit(how, ("stall_first", how, how)) for how in ways] + [Unit("slow", ("steps", 60, 0.05))]
    results = run(units, tmp_path, num_workers=4, stall_timeout_s=2.0, max_attempts=50, events=recorder)
    failed = recorder.of("failed")
    first = {name: error for name, attempt, error, _ in failed if attempt == 1}
    assert all(names(error, "2 s") for error in first.values())
    assert [how for how in ways if "in do_stall_first" in first[how]] == ["sleep"], "it answers: where it is"
    assert all(will_retry for *_, will_retry in failed)
    assert results["slow"] == 60
    if not was_silent(tmp_path, 2.0):
        assert results == dict.fromkeys(ways, 2) | {"slow": 60}, "3 s of work with progress are no stall"
        assert sorted(name for name, *_ in failed) == sorted(ways)
    assert living_workers(tmp_path) == []


def test_progress_arrives_in_order_and_with_its_end(tmp_path: Path) -> None:
    recorder = Recorder()
    run([Unit("slow", ("steps", 10, 0.05))], tmp_path, events=recorder)
    steps = [done for _, done, _ in recorder.of("progress")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 10
    assert [event[0] for event in recorder.events][-2:] == ["progress", "finished"]


def test_progress_arrives_while_the_unit_is_at_work(tmp_path: Path) -> None:
    heard: list[str] = []

    def hear(name: str) -> None:
        heard.append(name)
        if len(heard) == 4:
            (tmp_path / "go").touch()

    assert run([Unit("long", ("wait", "long"))], tmp_path, events=Recorder({"progress": hear})) == {"long": 1}


def test_a_busy_driver_does_not_blame_its_workers(tmp_path: Path) -> None:
    recorder = Recorder({"finished": lambda name: time.sleep(3.0 if name == "double-0" else 0.0)})
    units = [*doubles(1), Unit("slow", ("steps", 60, 0.05))]
    assert run(units, tmp_path, stall_timeout_s=2.0, max_attempts=50, events=recorder)["slow"] == 60
    assert recorder.of("failed") == [] or was_silent(tmp_path, 2.0)


def test_an_exception_of_the_driver_ends_all_workers(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([Unit("endless", ("wait", "endless")), *doubles(1)], tmp_path, events=Recorder({"finished": refuse}))
    assert living_workers(tmp_path) == []


def test_a_start_that_fails_once_is_repeated(tmp_path: Path) -> None:
    assert run(doubles(1), tmp_path, fail_start="once") == {"double-0": 0}
    assert attempts(tmp_path, "start") == 2


@pytest.mark.parametrize(
    ("fail_start", "starts", "message"),
    [
        ("value", 1, "ValueError: no such model: nowhere/nothing"),
        ("runtime", 2, "RuntimeError: start 1 fails"),
        ("hang", 2, "in __init__"),
    ],
)
def test_workers_that_never_start(fail_start: str, starts: int, message: str, tmp_path: Path) -> None:
    # What counts as a hang is longer than a process takes to come so far, on a busy machine too.
    limit = 120.0
    if fail_start == "hang":
        (started := tmp_path / "started").mkdir()
        begin = time.monotonic()
        run(doubles(1), started, num_workers=1)
        limit = 1.0 + 3 * (time.monotonic() - begin)
    with raises(WorkersFailed, message, "3 units"):
        run(doubles(3), tmp_path, num_workers=1, max_attempts=2, startup_timeout_s=limit, fail_start=fail_start)
    assert attempts(tmp_path, "start") == starts
    assert living_workers(tmp_path) == []


def test_gpus_are_shared_out_by_ray(tmp_path: Path) -> None:
    seen = {}
    for num_gpus in (0, 0.5, 2):
        environment = run([Unit("look", ("environment",))], tmp_path, num_gpus=num_gpus)["look"]
        seen[num_gpus] = environment["CUDA_VISIBLE_DEVICES"]
    assert seen == {0: "", 0.5: "0", 2: "0,1"}


def test_a_worker_too_large_for_the_session_is_refused_at_once(tmp_path: Path) -> None:
    with raises(ValueError, "1 CPU", "3 GPUs", "4 CPUs", "2 GPUs"):
        run(doubles(1), tmp_path, num_cpus=1, num_gpus=3)


def test_no_more_workers_than_the_session_has_room_for(tmp_path: Path) -> None:
    units = [Unit(f"meet-{index}", ("meet", f"meet-{index}", 2)) for index in range(4)]
    run(units, tmp_path, num_workers=4, num_cpus=0, num_gpus=1)
    assert attempts(tmp_path, "start") == 2


@pytest.mark.parametrize(
    "argument", [("num_workers", 0), ("max_attempts", 0), ("stall_timeout_s", 0.0), ("num_gpus", 1.5)]
)
def test_arguments_out_of_range(argument: tuple[str, Any], tmp_path: Path) -> None:
    with raises(ValueError, *argument):
        run(doubles(1), tmp_path, **dict([argument]))


def test_unit_names_must_be_unique(tmp_path: Path) -> None:
    with raises(ValueError, "double-0"):
        run([*doubles(2), *doubles(1)], tmp_path)


def test_workers_and_their_deaths_are_not_heard_on_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], session: Session
) -> None:
    with pytest.raises(UnitsFailed):
        run([Unit("loud", ("print",)), Unit("poison", ("exit", "poison"))], tmp_path, max_attempts=1)
    time.sleep(1.0)  # Ray's own report of a death comes later
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("num_cpus", "fitting"), [(1, 4), (2, 2), (3, 1), (4, 1), (5, 0)])
def test_workers_that_have_room_are_said_to_be_starting(session: Session, num_cpus: float, fitting: int) -> None:
    """With "6 workers of 1 CPUs: the cluster has 1 node with 4 CPUs" alone it reads as too small."""
    recipe = WorkerRecipe(SampleWorker, None, num_cpus, 0.0)
    said = _wanted([WorkerSlot(f"worker-{index}", recipe, session) for index in range(6)])
    assert names(said, 6, "1 CPU" if num_cpus == 1 else f"{num_cpus} CPUs")
    assert ("starting" in said) == (fitting > 0)
    assert fitting == 0 or names(said, fitting)
