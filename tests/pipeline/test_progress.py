import io
import threading
import time

import pytest
from rich.console import Console

from pipeline.progress import RunProgress, StageProgress
from pipeline.stages.distillation import Distillation
from pipeline.stages.evaluation import Evaluation


def test_an_error_with_brackets_is_shown_as_it_is() -> None:
    console = Console(file=io.StringIO(), width=200)
    error = "Traceback\nRuntimeError: [/src/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:3"
    display = StageProgress(console, "Trajectories")
    display.planned(["prompt-000"])
    display.started("prompt-000")
    display.failed("prompt-000", 1, error, will_retry=True)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert (
        "prompt-000 failed (attempt 1): RuntimeError: [/src/gloo/transport/tcp/pair.cc:537] Connection closed" in shown
    )
    assert "peer [127.0.0.1]:3; it is tried again" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_two_stages_at_once(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    distillation, evaluation = Distillation(), Evaluation()
    with RunProgress(console) as display:
        display.planned(distillation, ["segment-000", "segment-001", "segment-002"])
        display.planned(evaluation, ["prompt-000", "prompt-001"])
        display.settled(distillation, "segment-001")
        display.of(distillation).started("segment-000")
        display.of(evaluation).started("prompt-000")
        display.of(distillation).advanced("segment-000", 1, 2)
        display.of(distillation).finished("segment-000", 2.0)
        display.of(evaluation).finished("prompt-000", 1.0)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    expected = ["2/3", "1/2"] if terminal else ["Distillation: 2/3  segment-000", "Evaluation: 1/2  prompt-000"]
    assert all(text in shown for text in expected), shown


def test_what_a_run_without_workers_waits_for() -> None:
    console = Console(file=io.StringIO(), width=200)
    with RunProgress(console) as display:
        display.waiting("waiting for 2 workers of 1 CPUs and 1 GPUs: the cluster has 1 node [head]")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "waiting for 2 workers of 1 CPUs and 1 GPUs: the cluster has 1 node [head]\n"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_quick_kind_of_unit_is_no_measure_of_a_slow_one() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), width=200)
    stage = StageProgress(console, "Distillation", clock=clock)
    stage.planned([*(f"rtn-segment-{i:03d}" for i in range(4)), *(f"s2q-segment-{i:03d}" for i in range(4))])
    for index in range(3):
        stage.started(f"rtn-segment-{index:03d}")
        clock.now += 0.1
        stage.finished(f"rtn-segment-{index:03d}", 0.1)
        assert stage.left_s() is None, "nothing is known of s2q"
    stage.started("s2q-segment-000")
    stage.started("s2q-segment-001")
    clock.now += 100
    assert stage.left_s() is None
    stage.advanced("s2q-segment-000", 1, 4)
    # 300 s of one under way, 300 of the other, 2 x 400 and 0.1 not begun; two at a time
    assert stage.left_s() == pytest.approx((300 + 300 + 800 + 0.1) / 2)
    assert stage.at_work().startswith("Distillation 3/8, s2q-segment-000 25 %, s2q-segment-001 0 %, 11:40 left")
    clock.now += 300
    stage.finished("s2q-segment-000", 399.0)
    stage.started("s2q-segment-002")
    stage.started("s2q-segment-003")
    stage.started("rtn-segment-003")
    clock.now += 40
    # The longest one that is under way bounds the estimate from below.
    assert stage.left_s() == pytest.approx(360)
    stage.failed("s2q-segment-003", 1, "RuntimeError: x", will_retry=True)
    assert stage.left_s() == pytest.approx(max(360, (0 + 360 + 400 + 0) / 4))
    stage.failed("s2q-segment-002", 3, "RuntimeError: x", will_retry=False)
    assert "s2q-segment-002" not in stage.at_work()


def test_without_a_terminal_a_line_says_what_is_at_work() -> None:
    written = io.StringIO()
    distillation, evaluation = Distillation(), Evaluation()
    with RunProgress(Console(file=written, width=200), line_interval_s=0.01) as display:
        assert display.at_work() == ""
        display.planned(distillation, [f"s2q-segment-{i:03d}" for i in range(9)])
        for index in range(6):
            display.of(distillation).started(f"s2q-segment-{index:03d}")
        display.of(distillation).advanced("s2q-segment-003", 5, 8)
        display.planned(evaluation, ["prompt-000"])
        display.of(evaluation).started("prompt-000")
        deadline = time.monotonic() + 60
        while written.getvalue().count("prompt-000 0 %") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = [line for line in written.getvalue().splitlines() if "prompt-000 0 %" in line]
    assert len(lines) >= 2, "again and again, with nothing finished"
    assert all(text in lines[-1] for text in ("Distillation 0/9", "s2q-segment-003 62 %", "2 more", "Evaluation 0/1"))
    assert not any(thread.name == "progress" for thread in threading.enumerate())


@pytest.mark.parametrize("terminal", [False, True])
def test_names_with_markup_are_shown_as_they_are(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    with RunProgress(console) as display:
        display.planned(Evaluation(), ["[bold]-000", "[/x]"])
        for unit in ("[bold]-000", "[/x]"):
            display.of(Evaluation()).started(unit)
            display.of(Evaluation()).failed(unit, 1, "OSError: [/y] [red]gone[/red]", will_retry=True)
            display.of(Evaluation()).started(unit)
            display.of(Evaluation()).finished(unit, 1.0)
        display.waiting("[green]nodes")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "[bold]-000 failed (attempt 1): OSError: [/y] [red]gone[/red]" in shown
    assert "[green]nodes" in shown
