"""The input of a group of quantized layers: scaled, rotated and quantized once per tensor."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reelquant.ops.input_quantization.op import quantize_input
from reelquant.quantization.quantizer import quantize
from reelquant.quantization.rotation import transform_input

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of inputs that the operations of `reelquant.ops` take on a GPU."""


class QuantizedInput(NamedTuple):
    """A layer's input after the group's transform."""

    values: Tensor
    """`[..., d]`: int8 codes, or float32 where activations are not quantized."""
    scale: Tensor | None
    """`[..., 1]` float32, None where activations are not quantized."""


class InputTransform:
    """Scales, rotates and quantizes the input of one group, once per input tensor.

    The result is remembered as long as the input tensor lives and neither it nor the transform's tensors are changed in
    place (their version counters tell; writes through `.data` or a raw pointer do not move them). Nothing is remembered
    where versions do not exist or results must not outlive the call: inference mode, autograd, `torch.compile`, CUDA
    graph capture.
    """

    def __init__(self, activation_bits: int) -> None:
        self.activation_bits = activation_bits
        self._raised_bits: int | None = None
        self._memo: _Memo | None = None

    @property
    def current_bits(self) -> int:
        """Bits of the activations at this moment."""
        return self.activation_bits if self._raised_bits is None else max(self.activation_bits, self._raised_bits)

    def raise_bits(self, bits: int | None) -> None:
        """From now on at least `bits` for the activations, unclipped where that is more than their own; None for their own."""
        if bits != self._raised_bits:
            self._raised_bits = bits
            self.forget()

    def __call__(
        self, x: Tensor, *, channel_scale: Tensor | None, rotation: Tensor | None, activation_clip: Tensor | None
    ) -> QuantizedInput:
        """`x [..., d]` of any floating dtype; `channel_scale [d]`, `rotation [b, b]`, `activation_clip [1]`."""
        parts = (channel_scale, rotation, activation_clip)
        if not _has_versions(x, *parts):
            return self._compute(x, *parts)
        versions = tuple(None if tensor is None else tensor._version for tensor in (x, *parts))
        memo = self._memo
        if memo is not None and memo.is_for(x, parts, versions):
            return memo.result
        result = self._compute(x, *parts)
        self._memo = _Memo(weakref.ref(x, _Forget(self)), parts, versions, result)
        return result

    def _compute(
        self, x: Tensor, channel_scale: Tensor | None, rotation: Tensor | None, activation_clip: Tensor | None
    ) -> QuantizedInput:
        bits = self.current_bits
        clip = None if bits > self.activation_bits else activation_clip
        if bits < 16 and x.is_cuda and x.dtype in KERNEL_DTYPES:
            rows = x.reshape(-1, x.shape[-1])
            codes, scale = quantize_input(rows, bits=bits, channel_scale=channel_scale, rotation=rotation, clip=clip)
            return QuantizedInput(codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1))
        values = transform_input(x.float(), channel_scale, None if rotation is None else rotation.float())
        if bits == 16:
            return QuantizedInput(values, None)
        return QuantizedInput(*quantize(values, bits, -1, 1.0 if clip is None else clip))

    def forget(self, of: weakref.ref[Tensor] | None = None) -> None:
        """Drops what is remembered; with `of`, only what is remembered of that tensor."""
        memo = self._memo
        if of is None or (memo is not None and memo.input is of):
            self._memo = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": None}


@dataclass(frozen=True)
class _Memo:
    """The result for one input, valid while the same tensors have the same versions."""

    input: weakref.ref[Tensor]
    parts: tuple[Tensor | None, ...]
    versions: tuple[int | None, ...]
    result: QuantizedInput

    def is_for(self, x: Tensor, parts: tuple[Tensor | None, ...], versions: tuple[int | None, ...]) -> bool:
        same_parts = all(old is new for old, new in zip(self.parts, parts, strict=True))
        return self.input() is x and same_parts and self.versions == versions


class _Forget:
    """Called when a remembered input dies; does not keep the transform alive."""

    def __init__(self, transform: InputTransform) -> None:
        self._transform = weakref.ref(transform)

    def __call__(self, of: weakref.ref[Tensor]) -> None:
        transform = self._transform()
        if transform is not None:
            transform.forget(of)


def _has_versions(x: Tensor, *parts: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    if x.is_inference() or any(part is not None and part.is_inference() for part in parts):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
