"""A long step is announced: as a line in a log, and in a terminal only while it lasts."""

import io

import pytest
from rich.console import Console

from pipeline.phase import phase


def test_a_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with phase(Console(file=io.StringIO()), "Reading 25 GB"):
        assert capsys.readouterr() == ("", "Reading 25 GB …\n"), "what is piped on is plain"
    assert capsys.readouterr() == ("", "")


def test_a_spinner_in_a_terminal() -> None:
    written = io.StringIO()
    with phase(Console(file=written, force_terminal=True, width=60), "Reading 25 GB"):
        pass
    assert "Reading 25 GB …" in written.getvalue()
    assert written.getvalue().endswith("\x1b[2K"), "its line is cleared"
