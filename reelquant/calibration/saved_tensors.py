"""What autograd saves for a backward pass, kept elsewhere until then: less memory, the same bits, more time.

From a GPU it goes to page-locked host memory, on a CPU to a file without a name in the folder for temporary files (`TMPDIR`;
where that is in memory, nothing is gained). Nothing is computed twice, and what comes back has the values and strides that it
had, so every operation of the backward pass is the same one on the same numbers. (`torch.autograd.graph.save_on_cpu` keeps
no strides in page-locked memory, and a matrix product of another layout may round otherwise.)

Counted on the meta device for one step (forward, loss, backward) of HunyuanVideo 13B at 720x1280 and 61 frames, 57,856 tokens
x 3072, bfloat16, method `reelquant`; the block's weights are among it:

| block | as usual | saved elsewhere | moved there |
|---|---|---|---|
| double-stream | 22.9 GiB | 9.9 GiB | 20.4 GiB |
| single-stream | 21.1 GiB | 10.8 GiB | 17.6 GiB |

What is left are the operands of one operation at the widest layer. Computing parts again (activation checkpointing) saves far
less: a step is of one block, so whatever part is computed again stands in memory at once beside that operation's operands.
"""

from __future__ import annotations

import tempfile
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_tensors(*, elsewhere: bool) -> AbstractContextManager[None]:
    """While open, what operations save for their backward pass is kept `elsewhere`, or as usual. For one step.

    Raises, in forward and backward pass:
        OSError: the folder for temporary files is full.
        RuntimeError: no page-locked memory is left.
    """
    if not elsewhere:
        return nullcontext()
    shelf = _Shelf()
    hooks: AbstractContextManager[None] = saved_tensors_hooks(shelf.put, shelf.take)
    return hooks


@dataclass(frozen=True)
class _Kept:
    """A tensor on the shelf: its values as `_in_memory_order` has them."""

    like: Tensor
    """On the meta device: size, strides and dtype."""
    device: torch.device
    place: Tensor | int
    """Page-locked, or the offset in the file."""


class _Shelf:
    """Gone with the graph that refers to it, and its file with it."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._end = 0

    def put(self, tensor: Tensor) -> _Kept:
        values = _in_memory_order(tensor.detach()).contiguous()
        like = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
        if tensor.device.type == "cpu":
            return _Kept(like, tensor.device, self._write(values))
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return _Kept(like, tensor.device, host.copy_(values, non_blocking=True))

    def take(self, kept: _Kept) -> Tensor:
        like = kept.like
        tensor = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=kept.device)
        values = _in_memory_order(tensor)
        if isinstance(kept.place, Tensor):
            values.copy_(kept.place, non_blocking=True)
        elif values.is_contiguous():
            self._read(values, kept.place)
        else:
            dense = torch.empty(values.shape, dtype=values.dtype)
            self._read(dense, kept.place)
            values.copy_(dense)
        return tensor

    def _write(self, values: Tensor) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the graph lives
            weakref.finalize(self, self._file.close)
        offset = self._end
        self._file.seek(offset)
        self._end += self._file.write(_bytes(values))
        return offset

    def _read(self, values: Tensor, offset: int) -> None:
        assert self._file is not None, "something was put first"
        self._file.seek(offset)
        num = self._file.readinto(_bytes(values))  # type: ignore[attr-defined]
        assert num == values.nbytes, f"{num} of {values.nbytes} bytes are there"


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A view of every distinct element, axes of more than one by falling stride: contiguous where there are no gaps."""
    single = [size == 1 or stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    tensor = tensor[tuple(0 if one else slice(None) for one in single)]
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))


def _bytes(values: Tensor) -> memoryview:
    return values.reshape(-1).view(torch.uint8).numpy().data
