"""The INT8 linear layer in plain torch, on any device: what defines the result of the kernel.

Shapes: N tokens, d inputs, n outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu

EXACT_INPUTS = 1024
"""Products of so many codes add up exactly in float32: 1024 * 128 * 128 = 2^24."""
TILE_ROWS = 4096
"""Tokens at a time: bounds the float32 and int32 intermediates."""


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """`codes [N, d]` int8 times `weight [n, d]` int8 transposed: exact, int32 `[N, n]`, for d up to 131,071."""
    product = torch.zeros(len(codes), len(weight), dtype=torch.int32, device=codes.device)
    for start in range(0, codes.shape[1], EXACT_INPUTS):
        columns = slice(start, start + EXACT_INPUTS)
        product += (codes[:, columns].float() @ weight[:, columns].float().T).to(torch.int32)
    return product


def int8_linear_reference(
    codes: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    product: Callable[[Tensor, Tensor], Tensor] = integer_product,
) -> Tensor:
    """See `op.int8_linear`. Fills `out [N, n]`, which may be `residual`; everything after the `product` is in float32."""
    for start in range(0, len(codes), TILE_ROWS):
        rows = slice(start, start + TILE_ROWS)
        y = product(codes[rows], weight).float()
        y *= token_scale[rows, None].float()
        y *= weight_scale.float()
        if bias is not None:
            y += bias.float()
        if activation is not None:
            y = gelu(y, approximate="tanh")
        if gate is not None:
            y *= gate.float()
        if residual is not None:
            y += residual[rows].float()
        out[rows] = y.to(out.dtype)
    return out
