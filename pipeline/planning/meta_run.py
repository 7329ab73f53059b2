"""Peak memory of a piece of code, found by running it on the meta device: no weights, no memory, no GPU.

The code that runs is the workers' own, so the count cannot grow stale. Counted are the bytes of all live tensors, as
`torch.cuda.max_memory_allocated` sees them, without the workspaces of libraries and the allocator's rounding. Meta tensors
stand for those on the workers' device; tensors of the CPU count nothing. Attention counts as a fused kernel: it keeps its
inputs, its output and one number a row for the backward pass, never the L x L scores.

| where code meets a tensor without values | the answer |
|---|---|
| attention that may not be fused (`sdpa_kernel(SDPBackend.MATH)`) | all that torch does then |
| `float`, `int`, `bool` of a tensor, `tolist`, `nonzero` | those of `reelquant.calibration.without_values` |
| `x[mask]` | none: no value is bad |
| `is_cuda` | what the workers' tensors say |
| a copy to the CPU | a meta tensor that counts nothing |
| a loop over `reelquant.ops.implementation.turns` | two turns, as all others are alike |
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reelquant.calibration.without_values import META, answer, as_list, marked, no_autocast, places

_CPU = torch.device("cpu")


def peak_on_meta(work: Callable[[], Any], *, holding: Iterable[Tensor] = (), on_gpu: bool = False) -> int:
    """Most bytes alive at once while `work` runs, whose tensors must be on the meta device.

    Args:
        holding: weights and inputs, which count from the beginning.
        on_gpu: the meta tensors say that they are on a GPU.
    """
    live = LiveBytes()
    for tensor in holding:
        live.see(tensor)
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.device(META))
        modes.enter_context(no_autocast())
        modes.enter_context(_Functions(on_gpu=on_gpu))
        modes.enter_context(_Dispatch(live))
        work()
    return live.peak


class LiveBytes:
    """Counts the storages that are alive."""

    def __init__(self) -> None:
        self.peak = 0
        """Most bytes alive at once."""
        self._live = 0
        self._references: dict[int, weakref.ref[Any]] = {}

    def see(self, tensor: Tensor) -> None:
        """Counts the storage of `tensor`, once, until it dies."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._references or storage.device != META:
            return
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key, num_bytes))
        self._live += num_bytes
        self.peak = max(self.peak, self._live)

    def _forget(self, key: int, num_bytes: int) -> None:
        del self._references[key]
        self._live -= num_bytes


_made: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype] | None] = {}
"""Shape, strides and dtype of the one new tensor that an operation gives, for arguments of given shapes, or None where it gives
its first argument back; for all runs of this process: torch's own functions for meta tensors are Python for the most part, and
a block does the same operations many times."""
MOST_OPERATIONS = 1 << 16


class _Dispatch(TorchDispatchMode):
    def __init__(self, live: LiveBytes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if _gives_view(func):
            return func(*args, **given)
        if isinstance(out := given.get("out"), Tensor) and out.device == META:
            return out  # allocates nothing; not every release of torch knows all of them on the meta device
        if (known_answer := answer(func, args)) is not None:
            return known_answer()
        if func is torch.ops.aten._to_copy.default and args[0].device == META and given.get("device") == _CPU:
            return func(*args, **{**given, "device": META})
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [index for mask in args[1] for index in places(mask, chosen=False)])
        key = (func, _description(args), _description(tuple(given.items())))
        known = _made.get(key, ())
        if known is None:
            return args[0]
        if known:
            shape, strides, dtype = known
            made: Any = torch.empty_strided(shape, strides, dtype=dtype, device=META)
        else:
            made = func(*args, **given)
            if len(_made) < MOST_OPERATIONS:
                _learn(key, func, args, made)
        for leaf in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._live.see(leaf)
        return marked(func, made)


@cache
def _gives_view(func: Any) -> bool:
    """Whether an operation gives a view of what it is given, and nothing that would count."""
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _learn(key: Any, func: Any, args: tuple[Any, ...], out: Any) -> None:
    if not isinstance(out, Tensor) or out.device != META:
        return
    if args and out is args[0]:
        _made[key] = None
    elif all(result.alias_info is None for result in func._schema.returns):
        _made[key] = (out.shape, out.stride(), out.dtype)


def _description(argument: Any) -> Any:
    """All of an argument on which the result of an operation on the meta device depends, as a key."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device.type
    if isinstance(argument, tuple | list):
        return tuple(map(_description, argument))
    # Equal keys of other types give other dtypes: 1, 1.0 and True.
    return type(argument), argument


class _Functions(TorchFunctionMode):
    def __init__(self, *, on_gpu: bool) -> None:
        super().__init__()
        self._on_gpu = on_gpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and _may_fuse():
            query, key, value = (*args, *given.values())[:3]
            return _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
        if func == Tensor.is_cuda.__get__ and args[0].is_meta:  # type: ignore[attr-defined]
            return self._on_gpu
        if func is Tensor.tolist and args[0].is_meta:
            return as_list(args[0])
        return func(*args, **given)


def _may_fuse() -> bool:
    """Whether attention may run in a fused kernel; on a CPU too, this is asked."""
    allowed = torch.backends.cuda
    return bool(allowed.flash_sdp_enabled() or allowed.mem_efficient_sdp_enabled() or allowed.cudnn_sdp_enabled())


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of `module`."""
    return [*module.parameters(), *module.buffers()]


def bytes_of(module: nn.Module) -> int:
    """Of `tensors_of` it."""
    return sum(tensor.nbytes for tensor in tensors_of(module))


def to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` in `dtype`, for inference, by torch's own method: that of diffusers' classes speaks about it."""
    return nn.Module.to(module, dtype).eval()
