"""The full-precision pipeline that this process has open, kept from one worker to the next: reading a large model takes half a
minute from a local disk, and minutes from a distant one.

    trajectories -> selection -> activations     one pipeline; evaluation's references take it too
    everything else                              lets it go first: two models must not be in memory at once

The ranks of a replica do the same kinds of units in the same order: all of them have it, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workers.process import release_memory
from workers.sharded_model import open_full_precision
from workers.sharding import Sharding


@dataclass(frozen=True)
class _Kept:
    opened_with: tuple[Path, str | None, torch.device, torch.dtype, Sharding]
    pipeline: Any


_kept: list[_Kept] = []
"""At most one."""


def full_precision(
    folder: Path, *, device: torch.device, dtype: torch.dtype, sharding: Sharding, variant: str | None = None
) -> Any:
    """The pipeline as `open_full_precision` opens it: the one that is kept, or in its place a new one.

    Whoever changes it for its own purpose changes it back.

    Raises:
        ValueError: as `open_full_precision`.
    """
    wanted = (folder, variant, device, dtype, sharding)
    if not _kept or _kept[0].opened_with != wanted:
        let_go()
        opened = open_full_precision(folder, device=device, dtype=dtype, sharding=sharding, variant=variant)
        _kept.append(_Kept(wanted, opened))
    return _kept[0].pipeline


def let_go() -> None:
    """Nothing is kept any more, and the memory is free once no worker holds the pipeline."""
    if _kept:
        _kept.clear()
        release_memory()
