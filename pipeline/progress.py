"""What a person sees while a run works: bars with rate and remaining time in a terminal, one line a unit elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipeline.stages.stage import Stage


class RunProgress:
    """Progress of all stages that have units under way, one bar each."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages: dict[str, StageProgress] = {}
        self._bars: Progress | None = None

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("[bold]{task.description:<14}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def of(self, stage: Stage) -> StageProgress:
        """The progress of one stage."""
        if stage.name not in self._stages:
            self._stages[stage.name] = StageProgress(self._console, stage.title, self._bars)
        return self._stages[stage.name]

    def planned(self, stage: Stage, num: int) -> None:
        """The stage has so many units more."""
        self.of(stage).planned(num)

    def waiting(self, description: str) -> None:
        """No worker has a place yet."""
        self._console.print(f"[yellow]{escape(description)}", highlight=False)

    def settled(self, stage: Stage) -> None:
        """A unit of the stage is done without a worker."""
        self.of(stage).settled()


class StageProgress:
    """Progress of one stage; its unit of measure is the unit of work, with fractions from the units under way."""

    def __init__(self, console: Console, title: str, bars: Progress | None = None) -> None:
        self._console, self._title, self._bars = console, title, bars
        self._total = self._settled = self._finished = 0
        self._began = 0.0
        self._under_way: dict[str, float] = {}
        self._task: TaskID | None = None

    def planned(self, num: int) -> None:
        """There are so many units more."""
        self._total += num

    def settled(self) -> None:
        """A unit is done without a worker: it was done before, or another run has done it."""
        self._settled += 1
        self._show()

    def started(self, unit: str) -> None:
        """A unit was handed out."""
        if self._began == 0.0:
            self._began = time.monotonic()
            if self._bars is not None:
                self._task = self._bars.add_task(self._title, total=self._total, rate="", left="")
        self._under_way[unit] = 0.0

    def advanced(self, unit: str, done: int, total: int) -> None:
        """A unit is `done` of `total` through."""
        self._under_way[unit] = min(1.0, done / max(1, total))
        self._show()

    def finished(self, unit: str, seconds: float) -> None:
        """A unit is done."""
        self._under_way.pop(unit, None)
        self._finished += 1
        if self._bars is None:
            left = self._left()
            rest = f", {_duration(left)} left" if left else ""
            done = self._settled + self._finished
            self._console.print(f"{self._title}: {done}/{self._total}  {unit}  {seconds:.1f} s{rest}")
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
        if self._bars is None or self._task is None:
            return
        gained, elapsed = self._gained(), time.monotonic() - self._began
        rate = f"{gained / elapsed * 60:.1f}/min" if gained and elapsed > 1 else ""
        left = self._left()
        self._bars.update(
            self._task,
            total=self._total,
            completed=self._settled + gained,
            rate=rate,
            left=f"{_duration(left)} left" if left else "",
        )

    def _gained(self) -> float:
        return self._finished + sum(self._under_way.values())

    def _left(self) -> float:
        gained = self._gained()
        elapsed = time.monotonic() - self._began
        return elapsed / gained * (self._total - self._settled - gained) if gained else 0.0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
