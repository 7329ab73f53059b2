"""From a linear layer's input to its integer codes: checks, and the choice of an implementation.

    y = layer_norm(x) * scale_plus_one + shift      or x itself
    y = rotate_blocks(y / channel_scale, rotation)
    codes, token_scale = quantize(y, bits)          one scale per token

| implementation | where | the rotation's product |
|---|---|---|
| `reference` | any device | float32 |
| `triton` | CUDA from compute capability 8.0; d a multiple of 16, up to 16,384 | float16 x float16, summed in float32 |

The kernel holds whole tokens: its limit on d counts the rotation's blocks filled up to a power of two. Its rotation rounds
each value to 2^-12 of itself, so a code may come out one step beside the reference's where the value lies at the middle
between two: 0.1 to 0.8 % of codes at 8 bits (Gaussian data with loud channels), 0.14 % at 6, fewer at 4. Without a rotation
the two differ at the very middle alone, to 10^-5 of a step (up to 0.002 % of codes after a norm).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reelquant.ops.fake_quantization.reference import max_code
from reelquant.ops.implementation import Implementation, takes_triton
from reelquant.ops.input_quantization.reference import Norm, quantize_input_reference

__all__ = ["Implementation", "Norm", "quantize_input"]

SMALLEST_BLOCK = 16
LARGEST_BLOCK = 128
LARGEST_WIDTH = 16384
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def quantize_input(
    x: Tensor,
    *,
    bits: int,
    channel_scale: Tensor | None = None,
    rotation: Tensor | None = None,
    clip: Tensor | None = None,
    norm: tuple[float, Tensor, Tensor] | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Integer codes and scales of a layer's input, computed in float32 from whatever dtype `x` has.

    Shapes: N tokens, d inputs, b the rotation's block.

    Args:
        x: bf16, fp16 or fp32 `[N, d]`; rows may have any stride between them, columns lie side by side.
        bits: 2 to 8.
        channel_scale: float32 `[d]`, positive: the input is divided by it.
        rotation: floating `[b, b]`, b a power of two that divides d: applied to every block of b inputs.
        clip: `[1]` floating: factor on the input's range.
        norm: `(eps, scale_plus_one, shift)`, see `Norm`: LayerNorm and modulation in front; the vectors `[d]` floating.
        implementation: `auto` takes the kernel where it runs.

    Returns: codes int8 `[N, d]`, contiguous; token_scale float32 `[N]`. A token that holds NaN or inf has such a scale.
    Raises: ValueError for shapes or dtypes that do not fit, or `triton` where the kernel does not run.
    """
    max_code(bits)
    if x.ndim != 2 or x.dtype not in _FLOATS or not x.numel():
        raise ValueError(f"x must be bf16, fp16 or fp32 [N, d], not empty, got {x.dtype} {list(x.shape)}")
    d = x.shape[1]
    parts = None if norm is None else Norm(*norm)
    vectors = {"channel_scale": (channel_scale, d), "clip": (clip, 1)}
    if parts is not None:
        vectors |= {"norm's scale_plus_one": (parts.scale_plus_one, d), "norm's shift": (parts.shift, d)}
    problems = [
        f"{name} must be floating [{length}], got {vector.dtype} {list(vector.shape)}"
        for name, (vector, length) in vectors.items()
        if vector is not None and (vector.shape != (length,) or not vector.is_floating_point())
    ]
    if x.stride(1) != 1 and d > 1:
        problems.append(f"the columns of x must lie side by side, its strides are {x.stride()}")
    if rotation is not None:
        problems += _rotation_problems(rotation, d)
    if any(
        tensor is not None and tensor.device != x.device for tensor in (rotation, *(v for v, _ in vectors.values()))
    ):
        problems.append(f"all tensors must be on {x.device} as x is")
    if problems:
        raise ValueError("; ".join(problems))
    unsuited = _unsuited(d, rotation)
    with torch.no_grad():
        if takes_triton(implementation, x.device, unsuited=unsuited):
            from reelquant.ops.input_quantization.kernel import launch_quantize_input

            run: Callable[..., tuple[Tensor, Tensor]] = launch_quantize_input
        else:
            run = quantize_input_reference
        return run(x, bits=bits, channel_scale=channel_scale, rotation=rotation, clip=clip, norm=parts)


def _rotation_problems(rotation: Tensor, d: int) -> list[str]:
    b = len(rotation) if rotation.ndim else 0
    if rotation.ndim != 2 or rotation.shape != (b, b) or not b or b & (b - 1) or not rotation.is_floating_point():
        return [f"rotation must be floating [b, b], b a power of two, got {rotation.dtype} {list(rotation.shape)}"]
    return [f"rotation blocks of {b} do not divide {d} inputs"] if d % b else []


def _unsuited(d: int, rotation: Tensor | None) -> str | None:
    block = min(d & -d, LARGEST_BLOCK) if rotation is None else len(rotation)
    if not SMALLEST_BLOCK <= block <= LARGEST_BLOCK:
        return f"blocks of {block} for {d} inputs; it takes blocks of {SMALLEST_BLOCK} to {LARGEST_BLOCK}"
    blocks = d // block
    width = block << (blocks - 1).bit_length()
    if width > LARGEST_WIDTH:
        return f"{d} inputs are {width} when filled up to a power of two of blocks, more than {LARGEST_WIDTH}"
    return None
