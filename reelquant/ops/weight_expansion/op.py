"""Expansion of a layer's stored weight to the INT8 matrix of its product: checks, and the choice of an implementation.

| implementation | where |
|---|---|
| `reference` | any device, 2 to 8 bits |
| `triton` | CUDA from compute capability 8.0; 4, 6 and 8 bits, d a multiple of 16 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.fake_quantization.reference import GROUP_SIZE, max_code
from reelquant.ops.implementation import Implementation, takes_triton
from reelquant.ops.weight_expansion.bit_stream import CODES_PER_WORD
from reelquant.ops.weight_expansion.reference import expand_weight_reference

__all__ = ["Implementation", "expand_weight"]

KERNEL_BITS = (4, 6, 8)
LARGEST_NUMEL = 2**31 - 1
"""The kernel counts in 32 bits."""


def expand_weight(
    packed: Tensor,
    *,
    bits: int,
    num_inputs: int,
    group_scale: Tensor | None,
    out: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """What the INT8 product multiplies: the stored codes, times their group's integer scale in the layout `two_level`.

    Args:
        packed: uint8 `[n, ceil(d / 8) * bits]`, the bit stream of `quantization.packing`.
        bits: 2 to 8.
        num_inputs: d.
        group_scale: uint8 `[n, ceil(d / 64)]`, or None for the layout `per_channel`.
        out: int8 `[n, d]`, contiguous, to fill; None for a new one.
        implementation: `auto` takes the kernel where it runs.

    Returns: `out`: exact, as codes of the grid times their scale lie within +-127; others wrap around.
    Raises: ValueError for bits, shapes or dtypes that do not fit, or `triton` where the kernel does not run.
    """
    max_code(bits)
    row_bytes = -(-num_inputs // CODES_PER_WORD) * bits
    problems = []
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != row_bytes or not packed.numel():
        problems.append(
            f"{num_inputs} codes of {bits} bits are packed as uint8 [n, {row_bytes}], "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    rows = len(packed) if packed.ndim else 0
    groups = [rows, -(-num_inputs // GROUP_SIZE)]
    if group_scale is not None and (group_scale.dtype != torch.uint8 or list(group_scale.shape) != groups):
        problems.append(f"group_scale must be uint8 {groups}, got {group_scale.dtype} {list(group_scale.shape)}")
    shape = [rows, num_inputs]
    if out is not None and (out.dtype != torch.int8 or list(out.shape) != shape or not out.is_contiguous()):
        problems.append(f"out must be int8 {shape}, contiguous, got {out.dtype} {list(out.shape)}")
    others = [x for x in (group_scale, out) if x is not None]
    if any(x.device != packed.device for x in others):
        problems.append(f"all tensors must be on {packed.device} as packed is")
    if problems:
        raise ValueError("; ".join(problems))
    if out is None:
        out = torch.empty(shape, dtype=torch.int8, device=packed.device)
    unsuited = _unsuited(packed, bits, group_scale, out)
    if takes_triton(implementation, packed.device, unsuited=unsuited):
        from reelquant.ops.weight_expansion.kernel import launch_expand_weight

        return launch_expand_weight(packed, bits=bits, group_scale=group_scale, out=out)
    return expand_weight_reference(packed, bits=bits, group_scale=group_scale, out=out)


def _unsuited(packed: Tensor, bits: int, group_scale: Tensor | None, out: Tensor) -> str | None:
    if bits not in KERNEL_BITS:
        return f"it takes 4, 6 and 8 bits, not {bits}"
    if out.shape[1] % 16:
        return f"there are {out.shape[1]} inputs, no multiple of 16"
    if out.numel() > LARGEST_NUMEL:
        return f"{out.numel()} weights are more than it counts, {LARGEST_NUMEL}"
    tensors = (packed, out) if group_scale is None else (packed, out, group_scale)
    if not all(x.is_contiguous() for x in tensors) or packed.data_ptr() % 16 or out.data_ptr() % 16:
        return "packed, group_scale and out must be contiguous and aligned to 16 bytes"
    return None
