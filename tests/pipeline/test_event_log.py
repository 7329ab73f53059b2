"""The event log after a kill in the middle of a line, and on a disk that is full."""

import errno
from pathlib import Path

from pipeline.event_log import EventLog, read_events
from tests.errors import raises


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    EventLog(tmp_path).write("run_started", pid=1)
    with (tmp_path / "logs" / "events.jsonl").open("a") as file:
        file.write('{"time": "2026-01-02T03:0')
    EventLog(tmp_path).write("run_started", pid=2)
    EventLog(tmp_path).write("run_finished")
    assert [(e["event"], e.get("pid")) for e in read_events(tmp_path)] == [
        ("run_started", 1), ("run_started", 2), ("run_finished", None),
    ]  # fmt: skip


def test_an_error_names_the_file(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    (tmp_path / "logs" / "events.jsonl").symlink_to("/dev/full")
    with raises(OSError, f"[Errno {errno.ENOSPC}]", tmp_path / "logs" / "events.jsonl"):
        log.write("run_started")


def test_no_log_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path)) == []
