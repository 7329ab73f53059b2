"""`status`: the state of a run as human-readable tables, at most 80 columns wide where names allow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from pipeline.run_state import RunStatus, StageStatus, read_status
from pipeline.terminal import Part, PlainTable, counted, new_table, say, say_sentence, say_table
from storage.location import Location

_SHOWN_FAILURES = 8
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:\+\d\d:\d\d|Z)")


def show_status(location: Location, console: Console) -> None:
    """Prints the status of the run at `location`."""
    status = read_status(location)
    state = state_text(status.holder, status.died, finished=not status.to_do, begun=status.last_event is not None)
    say(console, ("run", "bold"), f"     {status.location}")
    say(console, ("state", "bold"), "   ", *state)
    if status.model is not None:
        say(console, ("model", "bold"), f"   {status.model}")
    if status.last_event is not None:
        say(console, ("last", "bold"), f"    {_event_text(status.last_event)}")
    console.line()
    say_table(console, _table(status))
    for style, word, text in details(status):
        say_sentence(console, (word, style), f"  {text}")
    console.line()
    say_sentence(console, _resume_text(status))


def details(status: RunStatus) -> Iterator[tuple[str, str, str]]:
    """Style, word and text of what is out of the ordinary."""
    failures = list(status.failures.items())
    for (stage, unit), (attempts, error) in failures[:_SHOWN_FAILURES]:
        yield "red", "failed", f"{stage}/{unit} ({counted(attempts, 'attempt')}): {error}"
    if len(failures) > _SHOWN_FAILURES:
        yield "red", "failed", f"and {len(failures) - _SHOWN_FAILURES} more, see logs/events.jsonl"
    for found in status.stages.values():
        if found.damaged:
            yield "yellow", "damaged", f"{found.name}: {_some(found.damaged)}; a resume redoes them"
        if found.out_of_memory or found.lean:
            yield "yellow", "memory", _memory_text(found)
        if found.running:
            yield "cyan", "at work" if status.holder else "cut off", f"{found.name}: {_some(found.running)}"


def _memory_text(stage: StageStatus) -> str:
    tries = f"{stage.out_of_memory} {'try' if stage.out_of_memory == 1 else 'tries'} ran out of it"
    lean = f"; done with less, and more time: {_some(stage.lean)}" if stage.lean else ""
    return f"{stage.name}: {tries}{lean}"


def state_text(at_work: str | None, died: str | None, *, finished: bool, begun: bool) -> tuple[Part, ...]:
    """What a run or study is doing.

    Args:
        at_work: its driver; `died` likewise, of one that ended without a word.
    """
    if at_work is not None:
        return ("running", "green"), f": {_readable_times(at_work)}"
    if died is not None:
        return ("stopped", "yellow"), f": its driver was killed ({_readable_times(died)})"
    if finished:
        return (("finished", "green"),)
    return (("stopped", "yellow"), ": no driver") if begun else (("not started", "yellow"),)


def _table(status: RunStatus) -> PlainTable:
    table = new_table("Stage", "Done", "Failed tries", "Work", "Wall time")
    for stage in status.stages.values():
        total = "?" if stage.total is None else f"{stage.total:,}"
        complete = stage.total is not None and stage.done >= stage.total
        table.add_row(
            stage.name.capitalize(),
            f"{stage.done:,}/{total}",
            f"{stage.retries:,}" if stage.retries else "-",
            _duration(stage.work_s) if stage.done else "-",
            _duration(stage.wall_s) if stage.wall_s else "-",
            style="green" if complete and stage.total else None,
        )
    return table


def _resume_text(status: RunStatus) -> str:
    to_do = status.to_do
    if not to_do:
        return "All units are done. Running it again checks their files and writes the report."
    counts = ", ".join(f"{name} {'?' if num is None else num}" for name, num in to_do.items())
    verb = "Left to do" if status.holder is not None else "Running it again does"
    return f"{verb}: {counts}. What is done is kept, if model and configuration are still the same."


def _event_text(event: Mapping[str, Any]) -> str:
    where = "/".join(str(event[key]) for key in ("stage", "unit") if key in event)
    return f"{_local_time(event['time'])}  {str(event['event']).replace('_', ' ')}" + (f"  {where}" if where else "")


def _local_time(text: str) -> str:
    """`2026-11-22 02:54:01 UTC (3 min ago)`."""
    time = datetime.fromisoformat(text).astimezone(UTC)
    ago = max(0.0, (datetime.now(UTC) - time).total_seconds())
    return f"{time:%Y-%m-%d %H:%M:%S} UTC ({_duration(ago)} ago)"


def _readable_times(text: str) -> str:
    """The text, with its times as `_local_time` shows them."""
    return _TIME.sub(lambda match: _local_time(match[0]), text)


def _duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _some(names: list[str], most: int = 4) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
