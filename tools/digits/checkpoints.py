"""Atomic files for training state: a reader never sees half a file, whatever ends the writer."""

import os
from pathlib import Path
from typing import Any

import torch


def save_atomically(state: Any, path: Path) -> None:
    """Writes `state` with torch.save beside `path`, then renames over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_if_present(path: Path, device: str | torch.device = "cpu") -> Any | None:
    """The state written by `save_atomically`, or None when there is none yet."""
    if not path.exists():
        return None
    return torch.load(path, map_location=device, weights_only=True)


def cosine_lr_factor(progress: float, warmup_frac: float, floor: float = 0.01) -> float:
    """Factor of the peak learning rate at `progress` in [0, 1]: linear warm-up, then half a cosine down to `floor`."""
    if progress < warmup_frac:
        return max(progress / warmup_frac, 1e-3)
    angle = min(1.0, (progress - warmup_frac) / (1.0 - warmup_frac)) * torch.pi
    return floor + (1.0 - floor) * 0.5 * (1.0 + float(torch.cos(torch.tensor(angle))))
