"""How a replica shares a model: part of a run's configuration, and of what workers are told. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reelquant.settings.declaration import Settings


@dataclass(frozen=True)
class Sharding(Settings):
    """How the workers of a replica hold the full-precision model. Changes no result."""

    sharding: Literal["none", "fsdp", "deepspeed"] = "none"
    """How a full-precision model too large for one GPU is shared where it runs as a whole (trajectories, activations, the
    evaluation's references): by PyTorch's FSDP2, or by DeepSpeed's ZeRO-3. All else takes what one GPU holds."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the shared model waits while it is not used, if the GPUs cannot hold it together: in host memory, or (`deepspeed`
    only) in files. Slow: every denoising step brings it to the GPUs."""
    offload_path: Path | None = None
    """Folder on a fast local disk, for `offload: nvme`."""
