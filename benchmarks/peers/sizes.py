"""Bytes of a quantized transformer, counted in its state dict: all tensors, scales and zero points too.

Some tools keep 4-bit values in wider integers, or only simulate them in floating point; such weights are counted twice:
as they are stored, and as they would be packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TransformerSizes:
    """`bits_per_weight` are those of the quantized linears, with all that belongs to them except biases."""

    transformer_bytes: int
    packed_transformer_bytes: int
    bits_per_weight: float
    packed_bits_per_weight: float
    num_quantized: int
    num_linears: int
    """Linears that could have been quantized."""
    quantized_weight_frac: float
    """Weights in quantized linears, of the weights of all those linears."""


def transformer_sizes(
    state: Mapping[str, object], shapes: Mapping[str, tuple[int, int]], value_bits: float | None = None
) -> TransformerSizes:
    """Sizes of a transformer.

    Args:
        state: its state dict; values that are no tensors count nothing.
        shapes: `(outputs, inputs)` by full name of the linears that could have been quantized.
        value_bits: of a quantized weight, where the tool stores it wider.

    Raises:
        ValueError: none of the linears is quantized, or one has no tensor.
    """
    others, by_linear = 0, {name: dict[str, Tensor]() for name in shapes}
    for name, tensor in _all_leaves(state):
        owner, rest = _split_owner(name, by_linear)
        if owner is None or rest == "bias":
            others += tensor_bytes(tensor)
        else:
            by_linear[owner][rest] = tensor
    if missing := [name for name, tensors in by_linear.items() if not tensors]:
        raise ValueError(f"the state dict holds no tensor of {len(missing)} linears: {', '.join(missing[:3])}, ...")
    stored = packed = weights = total = 0
    num_quantized = 0
    for name, tensors in by_linear.items():
        num_weights = shapes[name][0] * shapes[name][1]
        total += num_weights
        if _is_plain(tensors):
            others += sum(tensor_bytes(tensor) for tensor in tensors.values())
            continue
        num_quantized += 1
        weights += num_weights
        stored += sum(tensor_bytes(tensor) for tensor in tensors.values())
        packed += sum(_packed_bytes(tensor, num_weights, value_bits) for tensor in tensors.values())
    if not num_quantized:
        raise ValueError(f"none of the {len(shapes)} linears is quantized: {', '.join(list(shapes)[:3])}, ...")
    return TransformerSizes(
        transformer_bytes=others + stored,
        packed_transformer_bytes=others + packed,
        bits_per_weight=8 * stored / weights,
        packed_bits_per_weight=8 * packed / weights,
        num_quantized=num_quantized,
        num_linears=len(shapes),
        quantized_weight_frac=weights / total,
    )


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a plain tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _all_leaves(state: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield from _leaves(name, value)


def _leaves(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors inside a tensor subclass, as `name.<attribute>`."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        yield name, tensor
        return
    attributes, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for attribute in attributes:
        inner = getattr(tensor, attribute)
        if inner is not None:
            yield from _leaves(f"{name}.{attribute}", inner)


def _split_owner(name: str, owners: Mapping[str, object]) -> tuple[str | None, str]:
    """The linear that a tensor belongs to, and the rest of its name."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner = ".".join(parts[:end])
        if owner in owners:
            return owner, ".".join(parts[end:])
    return None, name


def _is_plain(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a linear is what it was: one floating-point weight and nothing else."""
    return set(tensors) == {"weight"} and tensors["weight"].is_floating_point() and tensors["weight"].ndim == 2


def _packed_bytes(tensor: Tensor, num_weights: int, value_bits: float | None) -> int:
    if value_bits is None or tensor.numel() != num_weights:
        return tensor_bytes(tensor)
    return math.ceil(num_weights * value_bits / 8)
