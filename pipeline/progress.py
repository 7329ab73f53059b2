"""Terminal output while a run works: bars with rate and remaining time in a terminal; elsewhere a line a unit, and a line a
minute with the units at work."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.units import headline
from pipeline.stages.stage import Stage
from pipeline.terminal import say

LINE_INTERVAL_S = 60.0
"""Longest silence without a terminal while units are at work."""
_SHOWN_UNITS = 4


class RunProgress:
    """Progress of all stages that have units under way, one bar each."""

    def __init__(self, console: Console, *, line_interval_s: float = LINE_INTERVAL_S) -> None:
        self._console, self._line_interval_s = console, line_interval_s
        self._stages: dict[str, StageProgress] = {}
        self._bars: Progress | None = None
        self._ended = threading.Event()
        self._teller: threading.Thread | None = None

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<14}", style="bold", markup=False),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
                console=self._console,
            )
            self._bars.start()
        else:
            self._teller = threading.Thread(target=self._tell, name="progress", daemon=True)
            self._teller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._teller is not None:
            self._teller.join()
        if self._bars is not None:
            self._bars.stop()

    def of(self, stage: Stage) -> StageProgress:
        """The progress of one stage."""
        if stage.name not in self._stages:
            self._stages[stage.name] = StageProgress(self._console, stage.title, self._bars)
        return self._stages[stage.name]

    def planned(self, stage: Stage, units: Sequence[str]) -> None:
        """The stage has these units more."""
        self.of(stage).planned(units)

    def waiting(self, description: str) -> None:
        """No worker has a place yet."""
        say(self._console, (description, "yellow"))

    def settled(self, stage: Stage, unit: str) -> None:
        """A unit of the stage is done without a worker."""
        self.of(stage).settled(unit)

    def at_work(self) -> str:
        """The units at work and how far they are, in one line; empty when none is."""
        found = [stage.at_work() for stage in list(self._stages.values())]
        return "; ".join(text for text in found if text)

    def _tell(self) -> None:
        while not self._ended.wait(self._line_interval_s):
            if text := self.at_work():
                say(self._console, f"at work: {text}")


class StageProgress:
    """Progress of one stage; its unit of measure is the unit of work, with fractions from the units under way.

    Times are estimated kind by kind: units whose names differ in numbers only are of one kind, and take about as long.
    """

    def __init__(
        self, console: Console, title: str, bars: Progress | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._title, self._bars, self._clock = console, title, bars, clock
        self._lock = threading.Lock()
        self._total = self._settled = self._finished = 0
        self._began = 0.0
        self._pending: Counter[str] = Counter()
        """Units that are not begun, by kind."""
        self._under_way: dict[str, tuple[float, float]] = {}
        """When a unit was handed out, and the share of it that is done."""
        self._parallel = 1
        self._taken_s: defaultdict[str, list[float]] = defaultdict(list)
        """Of finished units, by kind."""
        self._task: TaskID | None = None

    def planned(self, units: Sequence[str]) -> None:
        """There are these units more."""
        with self._lock:
            self._total += len(units)
            self._pending.update(map(_kind, units))

    def settled(self, unit: str) -> None:
        """A unit is done without a worker: it was done before, or another run has done it."""
        with self._lock:
            self._pending[_kind(unit)] -= 1
            self._settled += 1
        self._show()

    def started(self, unit: str) -> None:
        """A unit was handed out."""
        with self._lock:
            if self._task is None and self._bars is not None:
                self._task = self._bars.add_task(self._title, total=self._total, rate="", left="")
            if not self._under_way and not self._finished:
                self._began = self._clock()
            self._pending[_kind(unit)] -= 1
            self._under_way[unit] = (self._clock(), 0.0)
            self._parallel = max(1, len(self._under_way))

    def advanced(self, unit: str, done: int, total: int) -> None:
        """A unit is `done` of `total` through."""
        with self._lock:
            began, _ = self._under_way.get(unit, (self._clock(), 0.0))
            self._under_way[unit] = (began, min(1.0, done / max(1, total)))
        self._show()

    def finished(self, unit: str, seconds: float) -> None:
        """A unit is done."""
        with self._lock:
            began, _ = self._under_way.pop(unit, (self._clock() - seconds, 0.0))
            self._taken_s[_kind(unit)].append(self._clock() - began)
            self._finished += 1
            done = self._settled + self._finished
        if self._bars is None:
            say(self._console, f"{self._title}: {done}/{self._total}  {unit}  {seconds:.1f} s{self._left_text(', ')}")
        self._show()

    def failed(self, unit: str, attempt: int, error: str, will_retry: bool) -> None:
        """An attempt at a unit failed."""
        with self._lock:
            self._under_way.pop(unit, None)
            if will_retry:
                self._pending[_kind(unit)] += 1
        then = "it is tried again" if will_retry else "it is set aside"
        text = f"{self._title}: {unit} failed (attempt {attempt}): {headline(error)}; {then}"
        say(self._console, (text, "yellow"))

    def at_work(self) -> str:
        """Such as `Distillation 2/6, s2q-segment-000 37 %, 0:41:10 left`; empty when no unit is under way."""
        with self._lock:
            shares = {unit: share for unit, (_, share) in self._under_way.items()}
            done = self._settled + self._finished
        if not shares:
            return ""
        units = [f"{unit} {100 * share:.0f} %" for unit, share in list(shares.items())[:_SHOWN_UNITS]]
        more = [f"{len(shares) - _SHOWN_UNITS} more"] if len(shares) > _SHOWN_UNITS else []
        return ", ".join([f"{self._title} {done}/{self._total}", *units, *more]) + self._left_text(", ")

    def left_s(self) -> float | None:
        """Seconds until the stage is done; None where no unit of a kind that is left has shown how long it takes."""
        with self._lock:
            now, remaining = self._clock(), []
            for unit, (began, share) in self._under_way.items():
                known, spent = self._kind_s(_kind(unit)), now - began
                if share > 0:
                    remaining.append(spent / share * (1 - share))
                elif known is not None:
                    remaining.append(max(0.0, known - spent))
                else:
                    return None
            work_s = sum(remaining)
            for kind, num in self._pending.items():
                if num > 0 and (known := self._kind_s(kind)) is not None:
                    work_s += num * known
                elif num > 0:
                    return None
            return max([work_s / self._parallel, *remaining])

    def _kind_s(self, kind: str) -> float | None:
        """Seconds of a unit of this kind, from finished ones, or from those under way that have come some way."""
        if taken := self._taken_s.get(kind):
            return sum(taken) / len(taken)
        now = self._clock()
        rates = [(now - began) / s for other, (began, s) in self._under_way.items() if s > 0 and _kind(other) == kind]
        return sum(rates) / len(rates) if rates else None

    def _left_text(self, before: str = "") -> str:
        left = self.left_s()
        return f"{before}{_duration(left)} left" if left else ""

    def _show(self) -> None:
        if self._bars is None or self._task is None:
            return
        with self._lock:
            gained = self._finished + sum(share for _, share in self._under_way.values())
            elapsed, settled, total = self._clock() - self._began, self._settled, self._total
        rate = f"{gained / elapsed * 60:.1f}/min" if gained and elapsed > 1 else ""
        self._bars.update(self._task, total=total, completed=settled + gained, rate=rate, left=self._left_text())


def _kind(unit: str) -> str:
    return re.sub(r"-\d+", "-*", unit)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
