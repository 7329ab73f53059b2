"""Which GPUs a benchmark may hand to its processes."""

from __future__ import annotations

import os

import torch


def visible_gpus(num: int) -> list[str]:
    """The first `num` that this process may use, each as `CUDA_VISIBLE_DEVICES` names it.

    Raises: SystemExit where there are fewer.
    """
    found = torch.cuda.device_count()
    if found < num:
        raise SystemExit(f"{num} GPUs are asked for, {found} may be used here (CUDA_VISIBLE_DEVICES counts)")
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (listed.split(",") if listed else [str(index) for index in range(found)])[:num]
