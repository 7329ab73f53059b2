"""When what ran, from the event log: bars of units, with the time between two drivers cut out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Bar:
    """One attempt at a unit."""

    stage: str
    unit: str
    worker: str
    start_s: float
    """Since the first driver started, time without a driver left out."""
    seconds: float
    outcome: str
    """`finished`, `failed`, or `lost`: under way when its driver ended."""
    usage: Mapping[str, Any] | None = None
    """Of a finished unit (`workers.usage.Usage`)."""


@dataclass(frozen=True)
class Timeline:
    """All attempts of a run."""

    bars: tuple[Bar, ...]
    resumed_s: tuple[float, ...]
    """Where a later driver took over."""
    total_s: float
    """Time with a driver at work."""
    stage_s: Mapping[str, float]
    """Time by stage with a unit of it under way; stages overlap."""
    finished: bool
    """Whether the last driver came to the end."""
    began: datetime | None
    ended: datetime | None


@dataclass
class _Reader:
    bars: list[Bar] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)
    running: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)
    session_began: datetime | None = None
    offset_s: float = 0.0
    now_s: float = 0.0
    finished: bool = False

    def at(self, time: datetime) -> None:
        if self.session_began is None:
            self.session_began = time
        self.now_s = max(self.now_s, self.offset_s + (time - self.session_began).total_seconds())

    def session(self, time: datetime) -> None:
        self.end_session()
        if self.session_began is not None:
            self.resumed_s.append(self.now_s)
        self.session_began, self.offset_s, self.finished = time, self.now_s, False

    def end_session(self) -> None:
        for (stage, unit), (start, worker) in self.running.items():
            self.bars.append(Bar(stage, unit, worker, start, self.now_s - start, "lost"))
        self.running.clear()

    def end_unit(self, key: tuple[str, str], outcome: str, usage: Mapping[str, Any] | None = None) -> None:
        if key in self.running:
            start, worker = self.running.pop(key)
            self.bars.append(Bar(*key, worker, start, self.now_s - start, outcome, usage))


def read_timeline(events: Iterable[Mapping[str, Any]]) -> Timeline:
    """The timeline of a run's events, oldest first; events of other kinds and without a time are passed over."""
    reader, times = _Reader(), []
    for event in events:
        try:
            time = datetime.fromisoformat(event["time"])
        except (KeyError, TypeError, ValueError):
            continue
        times.append(time)
        kind = event.get("event")
        if kind == "run_started":
            reader.session(time)
            continue
        reader.at(time)
        key = (str(event.get("stage")), str(event.get("unit")))
        if kind == "unit_started":
            reader.end_unit(key, "lost")
            reader.running[key] = (reader.now_s, str(event.get("worker", "")))
        elif kind in ("unit_finished", "unit_failed"):
            reader.end_unit(key, kind.removeprefix("unit_"), event.get("usage"))
        elif kind == "run_finished":
            reader.end_session()
            reader.finished = True
    reader.end_session()
    bars = tuple(sorted(reader.bars, key=lambda bar: (bar.start_s, bar.stage, bar.unit)))
    began, ended = (times[0], times[-1]) if times else (None, None)
    stage_s = {stage: _covered_s(bar for bar in bars if bar.stage == stage) for stage in {bar.stage for bar in bars}}
    return Timeline(
        bars, tuple(reader.resumed_s), reader.now_s, stage_s, finished=reader.finished, began=began, ended=ended
    )


def _covered_s(bars: Iterable[Bar]) -> float:
    """Time with at least one of the bars, which come in order of their starts."""
    covered_s = end_s = 0.0
    for bar in bars:
        covered_s += max(0.0, bar.start_s + bar.seconds - max(bar.start_s, end_s))
        end_s = max(end_s, bar.start_s + bar.seconds)
    return covered_s
