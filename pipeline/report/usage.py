"""How busy workers, CPU, GPU, disk and network were, by stage: from what every finished unit took."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.grid import Cell, Grid, GridRow, Heading, cells, grid
from pipeline.report.quantities import NOTHING, bytes_text
from pipeline.report.timeline import Bar, Timeline

_HEADINGS = (
    Heading("Stage", text=True),
    Heading("Workers", "time in units"),
    Heading("CPU", "of a worker's"),
    Heading("GPU"),
    Heading("Read"),
    Heading("read at", "a worker"),
    Heading("Written"),
    Heading("written at", "a worker"),
    Heading("Disk", "busiest of the node"),
    Heading("Network", "of the node"),
)


def usage_grid(read: Timeline, stages: Sequence[str], *, threads: int) -> Grid | None:
    """A row for every stage with bars, and one for the whole run; None where no unit says what it took.

    Workers: time in units over the time of all workers while a unit of the stage was under way.

    Args:
        read: the timeline.
        stages: in order.
        threads: CPUs of one worker.
    """
    if not any(bar.usage for bar in read.bars):
        return None
    num_workers = len({bar.worker for bar in read.bars})
    rows = []
    for stage in stages:
        if bars := [bar for bar in read.bars if bar.stage == stage]:
            rows.append(GridRow(_cells(stage, bars, num_workers * read.stage_s[stage], threads)))
    whole = GridRow(_cells("whole run", read.bars, num_workers * read.total_s, threads), main=True)
    return grid(_HEADINGS, [*rows, whole])


def _cells(name: str, bars: Sequence[Bar], available_s: float, threads: int) -> tuple[Cell, ...]:
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

    return cells(
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
    return NOTHING if part is None or whole <= 0 else f"{100 * part / whole:.0f} %"


def _rate(num_bytes: float | None, seconds: float) -> str:
    return NOTHING if num_bytes is None or seconds <= 0 else f"{bytes_text(int(num_bytes / seconds))}/s"


def _bytes(num: float | None) -> str:
    return NOTHING if num is None else bytes_text(int(num))
