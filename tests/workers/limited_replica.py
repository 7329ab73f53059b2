"""Ranks that hold a small model together, over gloo, of which one may have no more memory than it is given."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from reelquant.settings.generation import Numerics
from storage.unit_store import UnitStore
from tests.workers.memory_limit import LIMITS, limit_memory
from workers.messages import Progress, UnitOutput
from workers.out_of_memory import GENERATION_ADVICE, SHARDING_ADVICE
from workers.process import prepare_process
from workers.process_group import join_process_group

NUM_LAYERS, WIDTH = 3, 64
NUM_TOKENS = 2**18
"""An activation of 64 MiB."""
LIMITED_RANK = 1


class LimitedReplica:
    """One rank, with its rows of every layer; its unit is a name, its result what the model makes of that unit's tokens.

    In a unit that `LIMITS` names, rank `LIMITED_RANK` may have so many MiB more than it has before, `null` for as many as there
    are: the first number in a process that has done nothing yet, the second in any other.
    """

    MEMORY_ADVICE = SHARDING_ADVICE + GENERATION_ADVICE

    def __init__(self, folder: Path) -> None:
        device, _ = prepare_process(Numerics("float32", 1))
        join_process_group(device)
        self._rank, num_ranks = dist.get_rank(), dist.get_world_size()
        (folder / f"{os.getpid()}.{self._rank}").touch()
        self._is_new = True
        self._rows = [layer.chunk(num_ranks)[self._rank].clone() for layer in make_layers()]

    def run(self, name: str, progress: Progress, store: UnitStore) -> UnitOutput:
        """The result; the device's name says which process made it."""
        with self._limited(name):
            total = apply(self._gathered, name, progress)
        return UnitOutput({"sum": total}, f"{os.getpid()}.{self._rank}", 0)

    def shadow(self, name: str, progress: Progress, store: UnitStore) -> None:
        """The same, for the other rank's sake."""
        with self._limited(name):
            apply(self._gathered, name, progress)

    @contextlib.contextmanager
    def _limited(self, name: str) -> Iterator[None]:
        new, later = json.loads(os.environ[LIMITS]).get(name, (None, None))
        if self._rank == LIMITED_RANK:
            limit_memory(new if self._is_new else later)
        self._is_new = False
        yield

    def _gathered(self, index: int) -> Tensor:
        """A layer, which all ranks ask for at once: one of them waits here for another that does not come."""
        parts = [torch.empty_like(self._rows[index]) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self._rows[index])
        return torch.cat(parts)


def make_layers() -> list[Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(NUM_LAYERS)]


def apply(layer: Callable[[int], Tensor], name: str, progress: Progress) -> float:
    """What layers 0, 1, ... make of the unit's own tokens: the sum of it."""
    tokens = torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(ord(name[0])))
    for index in range(NUM_LAYERS):
        progress(index, NUM_LAYERS)
        tokens = tokens @ layer(index).T
    return float(tokens.sum())
