"""`logs/events.jsonl` of a run: what happened when, one JSON object a line, appended by the driver."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events; a line is written at once, so that the log tells the truth after a kill."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "events.jsonl"
        self._end_torn_line()

    def write(self, event: str, **values: Any) -> None:
        """Appends one event with the current UTC time.

        Raises:
            OSError: the log cannot be written; names it.
        """
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, writing the event log", str(self._path)) from error

    def _end_torn_line(self) -> None:
        """A line cut short by a kill or a full disk must not take the next one with it."""
        if self._path.is_file() and self._path.stat().st_size > 0:
            with self._path.open("rb+") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """All events of a run, oldest first; lines torn by a kill are left out."""
    path = folder / "events.jsonl"
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
