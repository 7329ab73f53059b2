"""How busy workers, CPU, GPU, disk and network were, by stage: from what every finished unit took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.quantities import bytes_text
from pipeline.report.timeline import Bar, Timeline


@dataclass(frozen=True)
class UsageRow:
    """One stage, or the whole run, as text."""

    name: str
    workers: str
    """Time in units over the time of all workers while a unit of the stage was under way."""
    cpu: str
    gpu: str
    read: str
    read_rate: str
    written: str
    written_rate: str
    disk: str
    network: str


def usage_rows(read: Timeline, stages: Sequence[str], *, threads: int) -> list[UsageRow]:
    """A row for every stage with bars, and one for the whole run; empty where no unit says what it took.

    Args:
        read: the timeline.
        stages: in order.
        threads: CPUs of one worker.
    """
    if not any(bar.usage for bar in read.bars):
        return []
    num_workers = len({bar.worker for bar in read.bars})
    rows = []
    for stage in stages:
        if bars := [bar for bar in read.bars if bar.stage == stage]:
            rows.append(_row(stage, bars, num_workers * read.stage_s[stage], threads))
    return [*rows, _row("whole run", read.bars, num_workers * read.total_s, threads)]


def _row(name: str, bars: Sequence[Bar], available_s: float, threads: int) -> UsageRow:
    used = [bar.usage for bar in bars if bar.usage is not None]

    def total(key: str) -> float | None:
        values = [usage[key] for usage in used if usage.get(key) is not None]
        return sum(values) if values else None

    def seconds(key: str) -> float:
        return sum(float(usage["seconds"]) for usage in used if usage.get(key) is not None)

    def share(key: str, parts: float = 1) -> str:
        return _percent(total(key), seconds(key) * parts)

    def rate(key: str) -> str:
        return _rate(total(key), seconds(key))

    return UsageRow(
        name,
        _percent(sum(bar.seconds for bar in bars), available_s),
        share("cpu_s", threads),
        share("gpu_s"),
        _bytes(total("read_bytes")),
        rate("read_bytes"),
        _bytes(total("written_bytes")),
        rate("written_bytes"),
        share("disk_s"),
        rate("network_bytes"),
    )


def _percent(part: float | None, whole: float) -> str:
    return "–" if part is None or whole <= 0 else f"{100 * part / whole:.0f} %"


def _rate(num_bytes: float | None, seconds: float) -> str:
    return "–" if num_bytes is None or seconds <= 0 else f"{bytes_text(int(num_bytes / seconds))}/s"


def _bytes(num: float | None) -> str:
    return "–" if num is None else bytes_text(int(num))
