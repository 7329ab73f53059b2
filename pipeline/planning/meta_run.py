"""Counts what a piece of model code needs by running it on the meta device: no weights, no memory, no GPU.

The code that runs is the model's own, so the count cannot grow stale. Counted are the bytes of all live tensors (as
`torch.cuda.max_memory_allocated` sees them, without the workspaces of libraries and the allocator's rounding), the
floating-point operations of matrix products, convolutions and attention, and the bytes that all other operations read and
write. Attention is counted as a fused kernel: it keeps its inputs, its output and one number a row for the backward pass,
never the L x L scores. Where torch may use none (`sdpa_kernel(SDPBackend.MATH)`), it is counted as what it does then.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")


class MetaRun:
    """While open, counts all that the code inside does with meta tensors."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        """Most bytes alive at once, of tensors made inside and of those given to `hold`."""
        self.matrix_flops = 0
        """Of matrix products in 16 bits."""
        self.float32_flops = 0
        """Of matrix products of wider values, for which there are no tensor cores."""
        self.convolution_flops = 0
        self.attention_flops = 0
        """Of attention: 4 L_q L_k d forward, 10 L_q L_k d backward."""
        self.moved_bytes = 0
        """Read and written by all that is neither of these, each operation for itself; views move nothing."""
        self._live_bytes = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> MetaRun:
        self._modes.enter_context(_Attention(self))
        self._modes.enter_context(_Dispatch(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.close()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were there before: weights and inputs."""
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor: Tensor) -> None:
        """Counts the storage of `tensor`, once, until it dies."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._references:
            return
        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._live_bytes += self._sizes[key]
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _forget(self, key: int) -> None:
        del self._references[key]
        self._live_bytes -= self._sizes.pop(key)


@dataclass(frozen=True)
class _Operation:
    """What one operation gives and takes, for arguments of given shapes."""

    made: tuple[torch.Size, tuple[int, ...], torch.dtype] | None
    """Shape, strides and dtype of the new tensor, its only result; None where it gives something else."""
    in_place: bool
    """Whether it gives its first argument back."""
    flops: float
    counter: str
    """Attribute of `MetaRun` that counts its `flops`."""
    moved_bytes: int


_operations: dict[Any, _Operation] = {}
"""What is known of operations, for all counts of this process: torch's own functions for meta tensors are Python for the most
part, and a block does the same operations many times."""
MOST_OPERATIONS = 1 << 16


class _Dispatch(TorchDispatchMode):
    def __init__(self, run: MetaRun) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        key = (func, _description(args), _description(tuple(given.items())))
        known = _operations.get(key)
        if known is not None and known.made is not None:
            shape, strides, dtype = known.made
            out = torch.empty_strided(shape, strides, dtype=dtype, device=META)
        elif known is not None and known.in_place:
            out = args[0]
        else:
            out = func(*args, **given)
        if known is None:
            known = _counted(func, args, given, out)
            if len(_operations) < MOST_OPERATIONS:
                _operations[key] = known
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._run.see(leaf)
        setattr(self._run, known.counter, getattr(self._run, known.counter) + known.flops)
        self._run.moved_bytes += known.moved_bytes
        return out


def _description(argument: Any) -> Any:
    """All of an argument on which the result of an operation on the meta device depends, as a key."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device.type
    if isinstance(argument, tuple | list):
        return tuple(map(_description, argument))
    # Equal keys of other types give other dtypes: 1, 1.0 and True.
    return type(argument), argument


def _counted(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> _Operation:
    flops, counter, moved = 0.0, "matrix_flops", 0
    if (count := flop_registry.get(_out_of_place(func))) is not None:
        flops = count(*args, **kwargs, out_val=out)
        if "convolution" in func._schema.name:
            counter = "convolution_flops"
        elif cast(Tensor, out).itemsize > 2:
            counter = "float32_flops"
    elif not _only_makes_room(func):
        read = () if _only_writes(func) else (args, kwargs)
        moved = sum(_held_bytes(leaf) for leaf in tree_leaves((read, out)) if isinstance(leaf, Tensor))
    new = isinstance(out, Tensor) and all(result.alias_info is None for result in func._schema.returns)
    made = (out.shape, out.stride(), out.dtype) if new and out.device == META else None
    return _Operation(made, bool(args) and out is args[0], flops, counter, moved)


def _out_of_place(func: Any) -> Any:
    """The operation that does the same and makes a new tensor of it: flops are registered for that."""
    packet = func._overloadpacket
    name = packet.__name__
    return getattr(torch.ops.aten, name[:-1], packet) if name.endswith("_") else packet


def _only_makes_room(func: Any) -> bool:
    """Whether an operation gives a view, or memory that nobody has written."""
    views = [
        result for result in func._schema.returns if result.alias_info is not None and not result.alias_info.is_write
    ]
    return bool(views) or "empty" in func._schema.name or func._schema.name in ("aten::_unsafe_view", "aten::detach")


def _only_writes(func: Any) -> bool:
    return func._schema.name.removeprefix("aten::") in (
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "full",
        "fill_",
        "zero_",
    )


def _held_bytes(tensor: Tensor) -> int:
    """Of its elements; those of an expanded dimension lie in one place."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * tensor.element_size()


class _Attention(TorchFunctionMode):
    def __init__(self, run: MetaRun) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention or not _may_fuse():
            return func(*args, **(kwargs or {}))
        query, key, value = (*args, *(kwargs or {}).values())[:3]
        return _FusedAttention.apply(query, key, value, self._run)  # type: ignore[no-untyped-call]


def _may_fuse() -> bool:
    """Whether attention may run in a fused kernel; on a CPU too, this is asked."""
    allowed = torch.backends.cuda
    return bool(allowed.flash_sdp_enabled() or allowed.mem_efficient_sdp_enabled() or allowed.cudnn_sdp_enabled())


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, run: MetaRun) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.run, ctx.products = run, query.numel() * key.shape[-2]
        run.attention_flops += 4 * ctx.products
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.run.attention_flops += 10 * ctx.products
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def run_on_meta(work: Callable[[], Any], *, holding: Iterable[Tensor] = (), gradients: bool = False) -> MetaRun:
    """Counts one call of `work`, all of whose tensors must be on the meta device.

    Args:
        holding: weights and inputs, which count from the beginning.
        gradients: `work` returns a scalar, and its backward pass is counted too.
    """
    run = MetaRun()
    run.hold(holding)
    with torch.device(META), torch.set_grad_enabled(gradients), run:
        result = work()
        if gradients:
            cast(Tensor, result).backward()
    return run


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of `module`."""
    return [*module.parameters(), *module.buffers()]


def bytes_of(module: nn.Module) -> int:
    """Of `tensors_of` it."""
    return sum(tensor.nbytes for tensor in tensors_of(module))


def to_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` in `dtype`, for inference, by torch's own method: that of diffusers' classes speaks about it."""
    return nn.Module.to(module, dtype).eval()
