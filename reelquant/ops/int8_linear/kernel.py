"""The INT8 linear layer as one persistent Triton kernel for Hopper: `wgmma` s8 x s8 -> s32, operands and output by TMA.

Every program walks output tiles. `flatten` makes one loop of the walk over tiles and the walk over d, so that the next
tile's operands are under way while this one's epilogue runs. The scales stay out of the loop over d: the sum is exact.

Triton 3.6 waits for every step's product before it starts the next one: it leaves products in flight for float32 sums
alone (`WGMMAPipeline.cpp`, rule 2.1).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gelu_tanh(x, FAST: tl.constexpr):
    # x / 2 (1 + tanh(z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
    z = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    if FAST:
        # One instruction of the special function unit (16 a clock), error 2^-11: enough for 16-bit outputs.
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1)
        half = 0.5 * x
        return half + half * t
    # 1 + tanh(z) = 2 / (1 + exp(-2 z)); no cancellation for negative z
    return x / (1.0 + tl.exp2(z * -2.8853900817779268))


@triton.jit
def _finish(part, column, epilogue, WIDTH: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr):
    row, scale_of_rows, weight_scale, bias, gate, residual, out, num_outputs = epilogue
    columns = column + tl.arange(0, WIDTH)
    inside = columns < num_outputs
    scale_of_columns = tl.load(weight_scale + columns, mask=inside, other=0.0).to(tl.float32)
    y = part.to(tl.float32) * scale_of_rows[:, None] * scale_of_columns[None, :]
    if bias is not None:
        y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = _gelu_tanh(y, FAST)
    if gate is not None:
        y *= tl.load(gate + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        y += residual.load([row, column]).to(tl.float32)
    out.store([row, column], y.to(out.dtype))


@triton.jit
def _halves(x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    # [HEIGHT, WIDTH] -> its left and its right half, without moving data between threads.
    return tl.split(tl.permute(tl.reshape(x, (HEIGHT, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["num_tokens"])
def int8_linear_kernel(
    codes, token_scale, weight, weight_scale, bias, gate, residual, out,
    num_tokens, num_outputs, num_inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(num_tokens, BLOCK_M)
    num_n = tl.cdiv(num_outputs, BLOCK_N)
    num_k = tl.cdiv(num_inputs, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        in_group = GROUP * num_n
        first = (tile // in_group) * GROUP
        height = tl.minimum(num_m - first, GROUP)
        row = (first + (tile % in_group) % height) * BLOCK_M
        column = ((tile % in_group) // height) * BLOCK_N
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for k in range(num_k):
            a = codes.load([row, k * BLOCK_K])
            b = weight.load([column, k * BLOCK_K])
            product = tl.dot(a, b.T, product, out_dtype=tl.int32)
        rows = row + tl.arange(0, BLOCK_M)
        scale = tl.load(token_scale + rows, mask=rows < num_tokens, other=0.0)
        epilogue = (row, scale, weight_scale, bias, gate, residual, out, num_outputs)
        if SPLIT == 1:
            _finish(product, column, epilogue, BLOCK_N, GELU, FAST)
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = _halves(product, BLOCK_M, BLOCK_N)
            if SPLIT == 2:
                _finish(left, column, epilogue, HALF, GELU, FAST)
                _finish(right, column + HALF, epilogue, HALF, GELU, FAST)
            else:
                QUARTER: tl.constexpr = BLOCK_N // 4
                outer, inner = _halves(left, BLOCK_M, HALF)
                _finish(outer, column, epilogue, QUARTER, GELU, FAST)
                _finish(inner, column + QUARTER, epilogue, QUARTER, GELU, FAST)
                inner, outer = _halves(right, BLOCK_M, HALF)
                _finish(inner, column + HALF, epilogue, QUARTER, GELU, FAST)
                _finish(outer, column + HALF + QUARTER, epilogue, QUARTER, GELU, FAST)
