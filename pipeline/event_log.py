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

    def write(self, event: str, **values: Any) -> None:
        """Appends one event with the current UTC time."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """All events of a run, oldest first; a last line torn by a kill is left out."""
    path = folder / "events.jsonl"
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
