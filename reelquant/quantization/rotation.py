"""Channel scale and block rotation in front of a group of linear layers that read the same tensor.

    x' = rotate_blocks(x / channel_scale, R)          W' = (W * channel_scale) with each block of columns times R^-T

so that `x W^T = x' W'^T`. One [b, b] matrix R serves all d / b diagonal blocks. A checkpoint holds R as bfloat16, which
is no longer orthogonal to the last bit: the weight side therefore uses the inverse of that very matrix, in float64, and
the pair stays exact. Hadamard start: QuaRot (arXiv 2404.00456); Cayley parametrization: SpinQuant (arXiv 2405.16406).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.ops.input_quantization.reference import (
    check_channel_scale,
    check_square,
    rotate_blocks,
    transform_input,
)

__all__ = ["block_size", "cayley", "hadamard", "rotate_blocks", "transform_input", "transform_weight"]

LARGEST_BLOCK = 128


def block_size(d: int, largest: int = LARGEST_BLOCK) -> int:
    """Largest power of two that divides `d`, at most `largest` (a power of two): 192 -> 64, 3072 -> 128."""
    if d < 1:
        raise ValueError(f"a rotation needs at least one feature, got d = {d}")
    _check_power_of_two("largest", largest)
    return min(d & -d, largest)


def hadamard(n: int) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(n): float32 [n, n], orthogonal. ValueError unless n is a power of two."""
    _check_power_of_two("n", n)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.kron(step, matrix)
    orthogonal: Tensor = matrix * n**-0.5
    return orthogonal.float()


def cayley(a: Tensor) -> Tensor:
    """Orthogonal [b, b] matrix `(I + S)^-1 (I - S)` of the skew part `S = (a - a^T) / 2` of any square `a`.

    The identity for `a = 0`; differentiable; float32, or float64 for a float64 `a`. ValueError unless `a` is square.
    """
    check_square("a", a)
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    skew = (a - a.T) / 2
    eye = torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
    # Never singular, so nothing is asked back from the device.
    orthogonal: Tensor = torch.linalg.solve_ex(eye + skew, eye - skew).result
    return orthogonal


def transform_weight(weight: Tensor, channel_scale: Tensor | None, rotation: Tensor | None) -> Tensor:
    """The weight that goes with `transform_input`: `(W * channel_scale) @ blockdiag(R^-T, ...)`.

    Args: `weight` [out, d] floating; `channel_scale` [d]; `rotation` [b, b], any invertible matrix.
    Returns: [out, d], float32 (float64 for a float64 weight), computed in float64; differentiable in all three.
    Raises: ValueError where the shapes do not fit; torch.linalg.LinAlgError for a singular rotation.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out, in], got {tuple(weight.shape)}")
    result = weight.double()
    if channel_scale is not None:
        check_channel_scale(channel_scale, weight.shape[1])
        result = result * channel_scale.double()
    if rotation is not None:
        check_square("rotation", rotation)
        result = rotate_blocks(result, torch.linalg.inv(rotation.double()).T)
    return result.to(torch.promote_types(weight.dtype, torch.float32))


def _check_power_of_two(name: str, value: int) -> None:
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value}")
