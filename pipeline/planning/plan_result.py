"""What a run takes, and why it would fail."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.config.loading import ConfigError
from pipeline.context import RunContext
from pipeline.planning.machine import Disk
from pipeline.planning.model_size import CheckpointSize
from pipeline.planning.token_counts import TokenCounts


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    name: str
    title: str
    """For people."""
    units: int
    """Units of work in all, done ones too."""
    disk_bytes: int
    """What it writes: the data of arrays and tensors to the byte; headers of files and logs are not in it."""
    peak_memory_bytes: int | None
    """Of one worker: of its GPU, or of its process on a CPU. None where it is small."""


@dataclass
class Plan:
    """What a run takes and what is in its way."""

    context: RunContext
    counts: TokenCounts
    dtype: torch.dtype
    stages: tuple[StagePlan, ...]
    checkpoints: tuple[CheckpointSize, ...]
    """In the order of the methods."""
    disk: Disk
    problems: list[str]
    """Every reason known beforehand why the run would fail; empty if none is."""
    notes: list[str]
    """What does not stop it."""
    lacking: list[str]
    """What only this machine lacks, where the plan is for another one."""

    @property
    def disk_bytes(self) -> int:
        """What all stages write."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def worker_bytes(self) -> dict[str, int]:
        """Peak memory of one worker, by stage."""
        return {s.name: s.peak_memory_bytes for s in self.stages if s.peak_memory_bytes is not None}

    def require_feasible(self) -> None:
        """Stops a run that would fail.

        Raises:
            ConfigError: lists all problems.
        """
        if self.problems:
            raise ConfigError(self.problems)
