"""Code on the meta device that asks for values: the answers that keep it going.

| where code meets a tensor without values | the answer |
|---|---|
| `float`, `int`, `bool` of a tensor, `tolist` | 1.0, 0, True for every value: losses are finite, and no value is bad |
| `nonzero`, `x[mask]` | every place: nothing is masked |
| `x[~mask]` | the other places |
| `torch.autocast` | nothing |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


@contextmanager
def answers() -> Iterator[None]:
    """While open, tensors of the meta device answer."""
    with no_autocast(), _Functions(), _Dispatch():  # type: ignore[no-untyped-call]
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """While open, `torch.autocast` does nothing for the meta device, which it does not know."""
    original: Any = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else original(device_type, *args, **kwargs)

    torch.autocast = autocast  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


def answer(func: Any, args: tuple[Any, ...]) -> Callable[[], Any] | None:
    """What an operation gives whose result would need values; None for one that needs none."""
    if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
        return lambda: value_of(args[0].dtype)
    if func is torch.ops.aten.nonzero.default and args[0].device == META:
        return lambda: torch.empty(math.prod(args[0].shape), args[0].ndim, dtype=torch.int64, device=META)
    return None


def places(index: Tensor | None, *, chosen: bool) -> list[Tensor | None]:
    """An index, or in place of a mask those of all values, or of none; of an inverted one the others."""
    if index is None or index.dtype != torch.bool or index.device != META:
        return [index]
    chosen = chosen != hasattr(index, "is_inverse")
    return [torch.empty(index.numel() * chosen, dtype=torch.int64, device=META)] * index.ndim


def marked(func: Any, made: Any) -> Any:
    """What an operation has made; the inverse of a mask is known as one to `places`."""
    if func is torch.ops.aten.bitwise_not.default and made.device == META:
        made.is_inverse = True
    return made


def value_of(dtype: torch.dtype) -> float | int | bool:
    """A value of a tensor that has none."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0


def as_list(tensor: Tensor) -> Any:
    """`tolist` of a tensor without values."""
    return torch.full(tensor.shape, value_of(tensor.dtype), dtype=tensor.dtype, device="cpu").tolist()


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = answer(func, args)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in places(index, chosen=True)])
        return marked(func, func(*args, **(kwargs or {}))) if known is None else known()


class _Functions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.tolist and args[0].is_meta:
            return as_list(args[0])
        return func(*args, **(kwargs or {}))
