"""Which implementation of an operation runs: its reference in plain torch, or its Triton kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal

import torch

__all__ = ["Implementation", "obstacle", "reference_only", "takes_triton"]

Implementation = Literal["auto", "reference", "triton"]

AMPERE = (8, 0)
HOPPER = (9, 0)

_kernels_held_back: ContextVar[bool] = ContextVar("kernels_held_back", default=False)


@contextmanager
def reference_only() -> Iterator[None]:
    """While open, `auto` takes no Triton kernel anywhere: to tell what a kernel changes in a model's result.

    Holds for the thread that opens it.
    """
    token = _kernels_held_back.set(True)
    try:
        yield
    finally:
        _kernels_held_back.reset(token)


def takes_triton(
    implementation: Implementation,
    device: torch.device,
    *,
    unsuited: str | None = None,
    capability: tuple[int, int] = AMPERE,
    on_meta: bool = False,
) -> bool:
    """Whether the Triton kernel runs: `auto` takes it where it can, `triton` must be able to.

    Args:
        implementation: what the caller asked for.
        device: where its tensors are.
        unsuited: what about these arguments the kernel does not take, None where it takes them.
        capability: the least CUDA compute capability that the kernel runs on.
        on_meta: the kernel is registered for meta tensors too, which then stand for tensors on such a GPU.

    Raises: ValueError for an unknown implementation, or for `triton` where the kernel cannot run.
    """
    if implementation not in ("auto", "reference", "triton"):
        raise ValueError(f"no implementation {implementation!r}: there are auto, reference and triton")
    if implementation == "reference":
        return False
    if implementation == "auto" and _kernels_held_back.get():
        return False
    stands_in = on_meta and device.type == "meta"
    found = (None if stands_in else obstacle(device, capability)) or unsuited
    if found is not None and implementation == "triton":
        raise ValueError(f"implementation triton cannot run: {found}; use reference or auto")
    return found is None


def obstacle(device: torch.device, capability: tuple[int, int]) -> str | None:
    """Why no Triton kernel that needs `capability` can run on `device`, None if it can."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device}"
    if find_spec("triton") is None:
        return "triton is not installed"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return f"it needs compute capability {capability[0]}.{capability[1]}, {device} has {found[0]}.{found[1]}"
    return None
