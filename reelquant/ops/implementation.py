"""Which implementation of an operation runs: its reference in plain torch, or its Triton kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import Tensor

from reelquant.ops.architecture import Needs, architecture

__all__ = ["Implementation", "obstacle", "reference_only", "takes_int_mm", "takes_triton", "turns"]

Implementation = Literal["auto", "reference", "triton"]
T = TypeVar("T")

ANY_GPU = Needs()

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
    needs: Needs = ANY_GPU,
    on_meta: bool = False,
) -> bool:
    """Whether the Triton kernel runs: `auto` takes it where it can, `triton` must be able to.

    Args:
        implementation: what the caller asked for.
        device: where its tensors are.
        unsuited: what about these arguments the kernel does not take, None where it takes them.
        needs: what the kernel asks of the GPU.
        on_meta: the kernel is registered for meta tensors too, which then stand for tensors on such a GPU.

    Raises: ValueError for an unknown implementation, or for `triton` where the kernel cannot run.
    """
    if implementation not in ("auto", "reference", "triton"):
        raise ValueError(f"no implementation {implementation!r}: there are auto, reference and triton")
    if implementation == "reference" or (implementation == "auto" and _kernels_held_back.get()):
        return False
    stands_in = on_meta and device.type == "meta"
    found = (None if stands_in else obstacle(device, needs)) or unsuited
    if found is not None and implementation == "triton":
        raise ValueError(f"implementation triton cannot run: {found}; use reference or auto")
    return found is None


def takes_int_mm(implementation: Implementation, device: torch.device) -> bool:
    """Whether `auto` multiplies INT8 by `torch._int_mm`, where no kernel does."""
    return implementation == "auto" and not _kernels_held_back.get() and architecture(device).has_int8


def obstacle(device: torch.device, needs: Needs = ANY_GPU) -> str | None:
    """Why no Triton kernel with these needs can run on `device`, None if it can."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device}"
    if not _has_triton():
        return "triton is not installed"
    return architecture(device).obstacle(needs)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def turns(values: Sequence[T], tensor: Tensor) -> Sequence[T]:
    """`values` of a loop that works on `tensor`; on the meta device, where memory is counted, the first two: every turn but the
    first takes as much, beside what the one before has left."""
    return values[:2] if tensor.is_meta else values
