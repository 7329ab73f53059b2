"""A rank that needs torch, which takes a second of a CPU to import: the other sample workers do without."""

import errno
import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

from workers.process_group import join_process_group

Progress = Callable[[int, int], None]


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
