"""`logs/events.jsonl` of a run: what happened when, one JSON object a line, written by the driver."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from storage.line_log import open_log, read_log
from storage.location import Location
from storage.run_directory import LOGS

_NAME = f"{LOGS}/events.jsonl"

OUT_OF_MEMORY = "out of memory"
"""`reason` of a `unit_failed`; a `unit_finished` with `lean` was done with less memory than usual, and the same result."""


class EventLog:
    """The log of the run at a location; a line is written at once, so that the log tells the truth after a kill."""

    def __init__(self, run: Location) -> None:
        self._log = open_log(run, _NAME)

    def write(self, event: str, **values: Any) -> None:
        """Adds one event with the current UTC time.

        Raises:
            OSError: the log cannot be written; names it.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._log.append(json.dumps({"time": time, "event": event, **values}))


def read_events(run: Location) -> Iterator[dict[str, Any]]:
    """All events of the run at a location, oldest first; lines torn by a kill are left out."""
    for line in read_log(run, _NAME):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
