# ruff: noqa: ANN001, ANN201, ANN202, PLR0915  (as pyproject.toml says for kernel.py: Gluon compiles these)
# mypy: ignore-errors
"""The INT8 linear layer in Gluon for Hopper: two warpgroups multiply, one warp loads, products stay in flight.

Tiles of 128 x 256 x 128, walked by one program per multiprocessor. Each of two consumers owns 64 rows of the tile, as two
sums of 64 x 128, and its own barriers: while one writes its rows, the other goes on multiplying.

| who | waits for | signals |
|---|---|---|
| producer, 1 warp | `empty[stage]`: both consumers have read it | `full[stage]`: the bytes have arrived |
| consumer, 4 warps, twice | `full[stage]` | `empty[stage]`, once the products of the step before are done |
| consumer with a residual | `residual_full[consumer]`: the residual lies in its output buffers | |

Each consumer fills its own output buffers and stores them by TMA; it waits until such a store has read them before it, or
the residual's load, writes them again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 128
CODES_TILE, WEIGHT_TILE, OUT_TILE = (64, 128), (128, 128), (64, 128)
_DTYPES = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def tiles_of(matrix: Tensor, tile: tuple[int, int]) -> TensorDescriptor:
    """Descriptor of `matrix` in tiles, in the swizzled layout that `wgmma` reads."""
    layout = gl.NVMMASharedLayout.get_default_for(list(tile), _DTYPES[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix, list(tile), layout)


@gluon.jit
def _place(tile, num_m, num_n, GROUP: gl.constexpr):
    in_group = GROUP * num_n
    first = (tile // in_group) * GROUP
    height = gl.minimum(num_m - first, GROUP)
    return (first + (tile % in_group) % height) * 128, ((tile % in_group) // height) * 256


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _produce(codes, weight, operands, num_m, num_n, num_k, STAGES: gl.constexpr, GROUP: gl.constexpr):
    a_buffers, b_buffers, full, empty = operands
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        row, column = _place(tile, num_m, num_n, GROUP)
        for k in range(num_k):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, (128 + 256) * 128)
            for half in gl.static_range(2):
                inputs = k * 128
                tma.async_copy_global_to_shared(
                    codes, [row + 64 * half, inputs], ready, a_buffers.index(2 * stage + half)
                )
                tma.async_copy_global_to_shared(
                    weight, [column + 128 * half, inputs], ready, b_buffers.index(2 * stage + half)
                )
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _gelu_tanh(x):
    # As in kernel.py, with the tanh of the special function unit.
    z = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    t = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=gl.float32, is_pure=True, pack=1)
    half = 0.5 * x
    return half + half * t


@gluon.jit
def _finish(
    product, row, column, buffer, scale, vectors, out, num_outputs, LAYOUT: gl.constexpr,
    HAS_BIAS: gl.constexpr, GELU: gl.constexpr, HAS_GATE: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    weight_scale, bias, gate = vectors
    columns = column + gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    inside = columns < num_outputs
    scale_of_columns = gl.load(weight_scale + columns, mask=inside, other=0.0).to(gl.float32)
    y = product.to(gl.float32) * scale[:, None] * scale_of_columns[None, :]
    if HAS_BIAS:
        y += gl.load(bias + columns, mask=inside, other=0.0).to(gl.float32)[None, :]
    if GELU:
        y = _gelu_tanh(y)
    if HAS_GATE:
        y *= gl.load(gate + columns, mask=inside, other=0.0).to(gl.float32)[None, :]
    if HAS_RESIDUAL:
        y += buffer.load(LAYOUT).to(gl.float32)
    buffer.store(y.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], buffer)


@gluon.jit
def _consume(
    token_scale, vectors, residual, out, operands, out_buffers, residual_full, sizes, num_m, num_n, num_k,
    WHICH: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    HAS_BIAS: gl.constexpr, GELU: gl.constexpr, HAS_GATE: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    a_buffers, b_buffers, full, empty = operands
    num_tokens, num_outputs = sizes
    left_buffer = out_buffers.index(PARTS * WHICH)
    right_buffer = out_buffers.index(PARTS * WHICH + PARTS - 1)
    stage = 0
    phase = 0
    residual_phase = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        row, column = _place(tile, num_m, num_n, GROUP)
        row += 64 * WHICH
        if HAS_RESIDUAL:
            tma.store_wait(0)
            ready = residual_full.index(WHICH)
            mbarrier.expect(ready, 2 * 64 * 128 * 2)
            tma.async_copy_global_to_shared(residual, [row, column], ready, left_buffer)
            tma.async_copy_global_to_shared(residual, [row, column + 128], ready, right_buffer)
        left = gl.zeros([64, 128], gl.int32, LAYOUT)
        right = gl.zeros([64, 128], gl.int32, LAYOUT)
        mbarrier.wait(full.index(stage), phase)
        a = a_buffers.index(2 * stage + WHICH)
        left = warpgroup_mma(a, b_buffers.index(2 * stage).permute((1, 0)), left, use_acc=False, is_async=True)
        right = warpgroup_mma(a, b_buffers.index(2 * stage + 1).permute((1, 0)), right, use_acc=False, is_async=True)
        left, right = warpgroup_mma_wait(2, [left, right])
        before = stage
        stage, phase = _next(stage, phase, STAGES)
        for _ in range(1, num_k):
            mbarrier.wait(full.index(stage), phase)
            a = a_buffers.index(2 * stage + WHICH)
            left = warpgroup_mma(a, b_buffers.index(2 * stage).permute((1, 0)), left, is_async=True)
            right = warpgroup_mma(a, b_buffers.index(2 * stage + 1).permute((1, 0)), right, is_async=True)
            # All but the two just begun.
            left, right = warpgroup_mma_wait(2, [left, right])
            mbarrier.arrive(empty.index(before), count=1)
            before = stage
            stage, phase = _next(stage, phase, STAGES)
        left, right = warpgroup_mma_wait(0, [left, right])
        mbarrier.arrive(empty.index(before), count=1)
        rows = row + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
        scale = gl.load(token_scale + rows, mask=rows < num_tokens, other=0.0).to(gl.float32)
        if HAS_RESIDUAL:
            mbarrier.wait(residual_full.index(WHICH), residual_phase)
            residual_phase ^= 1
        else:
            tma.store_wait(0)
        _finish(
            left, row, column, left_buffer, scale, vectors, out, num_outputs,
            LAYOUT, HAS_BIAS, GELU, HAS_GATE, HAS_RESIDUAL,
        )  # fmt: skip
        if PARTS == 1:
            tma.store_wait(0)
        _finish(
            right, row, column + 128, right_buffer, scale, vectors, out, num_outputs,
            LAYOUT, HAS_BIAS, GELU, HAS_GATE, HAS_RESIDUAL,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def int8_linear_warp_specialized(
    codes, token_scale, weight, weight_scale, bias, gate, residual, out, num_tokens, num_outputs, num_inputs,
    STAGES: gl.constexpr, PARTS: gl.constexpr, GROUP: gl.constexpr,
    HAS_BIAS: gl.constexpr, GELU: gl.constexpr, HAS_GATE: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    a_buffers = gl.allocate_shared_memory(gl.int8, [2 * STAGES, 64, 128], codes.layout)
    b_buffers = gl.allocate_shared_memory(gl.int8, [2 * STAGES, 128, 128], weight.layout)
    out_buffers = gl.allocate_shared_memory(out.dtype, [2 * PARTS, 64, 128], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    residual_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for which in gl.static_range(2):
        mbarrier.init(residual_full.index(which), count=1)
    fence_async_shared()
    num_m = gl.cdiv(num_tokens, 128)
    num_n = gl.cdiv(num_outputs, 256)
    num_k = gl.cdiv(num_inputs, 128)
    vectors = (weight_scale, bias, gate)
    operands = (a_buffers, b_buffers, full, empty)
    sizes = (num_tokens, num_outputs)
    gl.warp_specialize([
        (_consume, (
            token_scale, vectors, residual, out, operands, out_buffers, residual_full, sizes, num_m, num_n, num_k,
            0, STAGES, GROUP, PARTS, HAS_BIAS, GELU, HAS_GATE, HAS_RESIDUAL,
        )),
        (_consume, (
            token_scale, vectors, residual, out, operands, out_buffers, residual_full, sizes, num_m, num_n, num_k,
            1, STAGES, GROUP, PARTS, HAS_BIAS, GELU, HAS_GATE, HAS_RESIDUAL,
        )),
        (_produce, (codes, weight, operands, num_m, num_n, num_k, STAGES, GROUP)),
    ], [4, 1], [232, 40])  # fmt: skip
