"""What a person sees while a run works: bars with rate and remaining time in a terminal, one line a unit elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class StageProgress:
    """Progress of one stage; its unit of measure is the unit of work, with fractions from the units under way."""

    def __init__(self, console: Console, title: str, *, total: int, done: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._finished, self._started_with, self._began = done, done, time.monotonic()
        self._under_way: dict[str, float] = {}
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> StageProgress:
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description:<14}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(
                self._title, total=self._total, completed=self._finished, rate="", left=""
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def started(self, unit: str) -> None:
        """A unit was handed out."""
        self._under_way[unit] = 0.0

    def advanced(self, unit: str, done: int, total: int) -> None:
        """A unit is `done` of `total` through."""
        self._under_way[unit] = min(1.0, done / max(1, total))
        self._show()

    def finished(self, unit: str, seconds: float) -> None:
        """A unit is done."""
        self._under_way.pop(unit, None)
        self._finished += 1
        if self._progress is None:
            left = self._left()
            rest = f", {_duration(left)} left" if left else ""
            self._console.print(f"{self._title}: {self._finished}/{self._total}  {unit}  {seconds:.1f} s{rest}")
        self._show()

    def failed(self, unit: str, attempt: int, error: str, will_retry: bool) -> None:
        """An attempt at a unit failed."""
        self._under_way.pop(unit, None)
        last = error.strip().splitlines()[-1] if error.strip() else "no message"
        then = "it is tried again" if will_retry else "it is set aside"
        self._console.print(
            f"[yellow]{self._title}: {escape(f'{unit} failed (attempt {attempt}): {last}')}; {then}", highlight=False
        )

    def _show(self) -> None:
        if self._progress is None or self._task is None:
            return
        done = self._finished + sum(self._under_way.values())
        elapsed, gained = time.monotonic() - self._began, done - self._started_with
        rate = f"{gained / elapsed * 60:.1f}/min" if gained and elapsed > 1 else ""
        left = self._left()
        self._progress.update(self._task, completed=done, rate=rate, left=f"{_duration(left)} left" if left else "")

    def _left(self) -> float:
        done = self._finished + sum(self._under_way.values())
        gained = done - self._started_with
        return (time.monotonic() - self._began) / gained * (self._total - done) if gained else 0.0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
