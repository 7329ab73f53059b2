import io

from rich.console import Console

from pipeline.progress import StageProgress


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
