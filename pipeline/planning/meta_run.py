"""Counts what a piece of model code needs by running it on the meta device: no weights, no memory, no GPU.

The code that runs is the model's own, so the count cannot grow stale. Counted are the bytes of all live tensors (as
`torch.cuda.max_memory_allocated` sees them, without the workspaces of libraries and the allocator's rounding), the
floating-point operations of matrix products, convolutions and attention, and the bytes that all other operations read and
write. Attention is counted as a fused kernel: it keeps its inputs, its output and one number a row for the backward pass,
never the L x L scores.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
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


class _Dispatch(TorchDispatchMode):
    def __init__(self, run: MetaRun) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._run.see(leaf)
        if (count := flop_registry.get(_out_of_place(func))) is not None:
            flops = count(*args, **(kwargs or {}), out_val=out)
            if "convolution" in func._schema.name:
                self._run.convolution_flops += flops
            elif cast(Tensor, out).itemsize > 2:
                self._run.float32_flops += flops
            else:
                self._run.matrix_flops += flops
        elif not _only_makes_room(func):
            given = () if _only_writes(func) else (args, kwargs or {})
            self._run.moved_bytes += sum(
                _held_bytes(leaf) for leaf in tree_leaves((given, out)) if isinstance(leaf, Tensor)
            )
        return out


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
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (*args, *(kwargs or {}).values())[:3]
        return _FusedAttention.apply(query, key, value, self._run)  # type: ignore[no-untyped-call]


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
