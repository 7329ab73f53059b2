import io

import pytest
from rich.console import Console

from pipeline.progress import RunProgress, StageProgress
from pipeline.stages.distillation import Distillation
from pipeline.stages.evaluation import Evaluation


def test_an_error_with_brackets_is_shown_as_it_is() -> None:
    console = Console(file=io.StringIO(), width=200)
    error = "Traceback\nRuntimeError: [/src/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:3"
    display = StageProgress(console, "Trajectories")
    display.planned(1)
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
        display.planned(distillation, 3)
        display.planned(evaluation, 2)
        display.settled(distillation)
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
