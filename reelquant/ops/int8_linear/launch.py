"""Launches the kernels of the INT8 linear layer: which tile, which schedule, which of the two kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from reelquant.ops.architecture import architecture, launching
from reelquant.ops.int8_linear.kernel import int8_linear_kernel


@dataclass(frozen=True)
class Config:
    """Tile and schedule of one launch."""

    block_m: int
    """Tokens of an output tile."""
    block_n: int
    """Outputs of an output tile."""
    block_k: int
    """Inputs of one step of the loop."""
    num_warps: int
    num_stages: int
    """Steps whose operands are in shared memory at once."""
    group: int = 8
    """Rows of tiles that are walked together, column by column, so that operands are found in L2."""
    split: int = 1
    """Parts (1, 2 or 4) in which the epilogue takes a tile: more parts, less shared memory for the output."""
    persistent: bool = True
    """One program per multiprocessor that walks tiles; otherwise one per tile."""
    flatten: bool = True
    """One loop over tiles and d."""
    shared_kib: int = 0
    """Shared memory of a program with the heaviest epilogue in 16 bits; a test compiles it."""


SMALL = Config(64, 32, 256, num_warps=4, num_stages=4, persistent=False, flatten=False, shared_kib=101)
"""Text tokens alone: bound by reading the weight once, so as many programs as there are columns."""
MEDIUM = Config(128, 128, 128, num_warps=8, num_stages=4, split=2, shared_kib=161)
LARGE = Config(128, 256, 128, num_warps=8, num_stages=3, split=2, shared_kib=209)


def choose_config(num_tokens: int, num_outputs: int, *, num_multiprocessors: int) -> Config:
    """By class of shape, the fastest measured."""
    if num_tokens <= 512:
        return SMALL
    # Tiles of 128 x 256 leave multiprocessors without one: smaller tiles.
    if triton.cdiv(num_tokens, LARGE.block_m) * triton.cdiv(num_outputs, LARGE.block_n) < 2 * num_multiprocessors:
        return MEDIUM
    return LARGE


def launch_int8_linear(
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
    config: Config | None = None,
) -> Tensor:
    """Fills `out`; arguments as checked by `op.int8_linear`. `config` None: by shape."""
    if config is None:
        count = architecture(out.device).num_multiprocessors
        config = choose_config(len(codes), len(weight), num_multiprocessors=count)
    config = fitting(config, out, residual)
    vectors = (token_scale, weight_scale, bias, gate)
    with launching(out, config.shared_kib):
        _run(codes, weight, vectors, residual, out, gelu=activation is not None, config=config)
    return out


def _run(
    codes: Tensor, weight: Tensor, vectors: Any, residual: Tensor | None, out: Tensor, *, gelu: bool, config: Config
) -> None:
    found = architecture(out.device)
    num_tiles = triton.cdiv(len(codes), config.block_m) * triton.cdiv(len(weight), config.block_n)
    num_programs = min(num_tiles, found.num_multiprocessors) if config.persistent else num_tiles
    part = [config.block_m, config.block_n // config.split]
    token_scale, weight_scale, bias, gate = vectors
    int8_linear_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(codes, [config.block_m, config.block_k]),
        token_scale,
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        weight_scale,
        bias,
        gate,
        None if residual is None else TensorDescriptor.from_tensor(residual, part),
        TensorDescriptor.from_tensor(out, part),
        len(codes),
        len(weight),
        codes.shape[1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        SPLIT=config.split,
        GELU=gelu,
        FAST=out.dtype != torch.float32 and found.has_wgmma,  # PTX, tested there
        FLATTEN=config.flatten and config.persistent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def fitting(config: Config, out: Tensor, residual: Tensor | None) -> Config:
    """`config`, or what comes nearest to it and takes these dtypes within shared memory."""
    widest = max(out.element_size(), 0 if residual is None else residual.element_size())
    if widest == 2 or config.block_n < 128:
        return config
    return replace(config, split=4, num_stages=min(3, config.num_stages))
