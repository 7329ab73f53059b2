"""Workers whose ranks wait for each other, as those do that hold one model, and that misbehave on request."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.cluster.sample_workers import SampleWorker, Settings

Progress = Callable[[int, int], None]


class SampleReplica(SampleWorker):
    """One rank. Its units are those of `SampleWorker` and those below; in each, all ranks meet once."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.generation = f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}"
        self.num_meetings = 0
        self.meet()

    def shadow(self, unit: tuple[Any, ...], progress: Progress, /) -> None:
        """Meet the others, who do `unit`."""
        self.mark(f"shadow-{unit[1]}")
        self.meet()

    def meet(self) -> None:
        """Wait for the same call of all ranks: for ever, when one does not come."""
        self.num_meetings += 1
        stem = f"meeting.{self.generation}.{self.num_meetings}"
        (self.settings.marks / f"{stem}.{self.rank}").touch()
        while len(list(self.settings.marks.glob(f"{stem}.*"))) < self.world_size:
            time.sleep(0.01)

    def do_together(self, progress: Progress, name: str) -> tuple[str, int]:
        """Succeed; say which rank has done it."""
        self.mark(name)
        self.meet()
        return name, self.rank

    def do_fail_first(self, progress: Progress, name: str, how: str) -> tuple[str, int]:
        """Fail in the first attempt, before the meeting."""
        before = self.mark(name)
        progress(1, 2)
        if before == 0:
            if how == "runtime":
                raise RuntimeError("bad luck")
            if how != "sleep":
                os.kill(os.getpid(), signal.SIGKILL if how == "SIGKILL" else signal.SIGSTOP)
            time.sleep(600)  # a signal to a process of many threads does not stop this one at once
        self.meet()
        return name, self.rank

    def do_environment(self, progress: Progress) -> dict[str, str]:
        """The process's environment, after a meeting."""
        self.meet()
        return dict(os.environ)


class RankOrAlone:
    """`SampleReplica` as a rank, `SampleWorker` as a process of its own."""

    def __init__(self, settings: Settings) -> None:
        self.worker: Any = (SampleReplica if "RANK" in os.environ else SampleWorker)(settings)

    def run(self, unit: tuple[Any, ...], progress: Progress, /) -> Any:
        """Do `unit`."""
        return self.worker.run(unit, progress)

    def shadow(self, unit: tuple[Any, ...], progress: Progress, /) -> None:
        """Meet the others, who do `unit`."""
        self.worker.shadow(unit, progress)
