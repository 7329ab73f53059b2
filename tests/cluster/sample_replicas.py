"""Workers whose ranks wait for each other, as those do that hold one model, and that misbehave on request."""

import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.cluster.sample_workers import SampleWorker, Settings
from workers.process_group import join_process_group

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


class JoiningRank:
    """A rank that joins a process group, after it has tried to take the port where the ranks are to meet."""

    def __init__(self, _settings: None) -> None:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_server(place).close()
            self.took_port = "taken"
        except OSError as error:
            self.took_port = errno.errorcode[error.errno or 0]
        join_process_group(torch.device("cpu"))

    def run(self, rank: int, progress: Progress, /) -> tuple[str, list[int]]:
        """Say how the attempt went, and which units the ranks have."""
        units = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(units, torch.tensor([rank]))
        return self.took_port, [int(unit) for unit in units]

    def shadow(self, rank: int, progress: Progress, /) -> None:
        """Take part in rank 0's unit."""
        self.run(rank, progress)


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
