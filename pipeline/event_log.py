"""`logs/events.jsonl` of a run: what happened when, one JSON object a line, written by the driver."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from storage.location import Location
from storage.open_store import open_store

_NAME = "events.jsonl"
"""In a bucket, where nothing is appended to, numbered parts of it (`storage.s3_log`)."""

OUT_OF_MEMORY = "out of memory"
"""`reason` of a `unit_failed`; a `unit_finished` with `lean` was done with less memory than usual, and the same result."""


class EventLog:
    """The log in a run's folder `logs`; a line is written at once, in a bucket after two seconds, so that the log tells the
    truth after a kill."""

    def __init__(self, folder: Location) -> None:
        self._log = open_store(folder.parent).open_log(folder.name, _NAME)

    def write(self, event: str, **values: Any) -> None:
        """Adds one event with the current UTC time.

        Raises:
            OSError: the log cannot be written; names it.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._log.append(json.dumps({"time": time, "event": event, **values}))

    def close(self) -> None:
        """Makes everything visible; raises as `write`."""
        self._log.close()


def read_events(folder: Location) -> Iterator[dict[str, Any]]:
    """All events of a run, oldest first; lines torn by a kill are left out."""
    for line in open_store(folder.parent).read_log(folder.name, _NAME):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
