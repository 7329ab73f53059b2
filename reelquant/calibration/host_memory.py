"""Tensors that wait in host memory for their turn on a GPU.

A GPU reads page-locked memory at the rate of its bus and while it computes; ordinary memory several times slower, and the
computation waits. PyTorch rounds a page-locked block up to a power of two bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, itself if it is there; from a GPU into page-locked host memory, and from there without waiting."""
    if tensor.is_cuda and device.type == "cpu":
        # The host may read it at once, so this copy waits.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.device.type == "cpu" and tensor.is_pinned())


def moved_all(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """`moved` of each."""
    return {name: moved(tensor, device) for name, tensor in tensors.items()}


def page_locked(tensor: Tensor) -> Tensor:
    """`tensor` in page-locked memory, itself where there is no CUDA GPU or it is on one."""
    return tensor.pin_memory() if tensor.device.type == "cpu" and torch.cuda.is_available() else tensor
