"""Both terms of a refresh in two passes over the attention outputs; what is small between them is the reference's.

    pass 1   R = dense - sparse, C = R - U V^T of the refresh before      ->  R^T R and C^T C, in parts of the tokens
             top directions V1, V2 of both, [D, D] a head: `reference.top_directions`
    pass 2   R and C again                                                ->  R V1, C V2

Neither R nor C is ever in memory. R is rounded to bf16 for the products, which adds 2^-9 of a value at random; directions enter
as two bf16 parts, so nothing is lost of them.

Shapes: H heads, L tokens, D head size, k rank (filled up to K, a power of two, at least 16).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelquant.ops.architecture import architecture, launching
from reelquant.ops.residual_factorization.reference import Factors, top_directions

GRAM_TOKENS, PROJECTED_TOKENS = 32, 128
"""Tokens of a tile of either pass."""
GRAMS_KIB = 64
"""Shared memory of a program of pass 1, at most; a test compiles it."""


@triton.jit
def _residual(dense, sparse, rows, stride_dl, stride_sl, L, D: tl.constexpr):
    """float32 [BLOCK_L, D]; zero beyond the last token."""
    columns = tl.arange(0, D)[None, :]
    inside = rows[:, None] < L
    d = tl.load(dense + rows[:, None].to(tl.int64) * stride_dl + columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sparse + rows[:, None].to(tl.int64) * stride_sl + columns, mask=inside, other=0.0).to(tl.float32)
    return d - s


@triton.jit
def _two_parts(x, PRODUCT: tl.constexpr):
    """x = high + low, both of the products' type."""
    high = x.to(PRODUCT)
    return high, (x - high.to(tl.float32)).to(PRODUCT)


@triton.jit
def _known(old_rows, high, low, rows, L, rank, K: tl.constexpr, PRODUCT: tl.constexpr):
    """float32 [BLOCK_L, D]: what the refresh before kept, `U V^T`; V^T in two parts [K, D]."""
    ks = tl.arange(0, K)[None, :]
    mask = (rows[:, None] < L) & (ks < rank)
    u = tl.load(old_rows + rows[:, None].to(tl.int64) * rank + ks, mask=mask, other=0.0).to(PRODUCT)
    return tl.dot(u, high) + tl.dot(u, low)


@triton.jit(do_not_specialize=["L", "tokens_of_part"])
def _grams(
    dense, sparse, old_rows, old_directions, out,
    stride_dh, stride_dl, stride_sh, stride_sl, L, rank, tokens_of_part,
    D: tl.constexpr, K: tl.constexpr, BLOCK_L: tl.constexpr, WITH_CHANGE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Gram matrices of one head over one part of the tokens: `out [terms, parts, H, D, D]`."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    parts, heads = tl.num_programs(0), tl.num_programs(1)
    dense += head * stride_dh
    sparse += head * stride_sh
    old_rows += head * L * rank
    ds, ks = tl.arange(0, D), tl.arange(0, K)
    if WITH_CHANGE:
        at = old_directions + head * D * rank + ds[None, :] * rank + ks[:, None]
        high, low = _two_parts(tl.load(at, mask=ks[:, None] < rank, other=0.0), PRODUCT)
    gram = tl.zeros((D, D), tl.float32)
    change_gram = tl.zeros((D, D), tl.float32)
    begin = part * tokens_of_part
    end = tl.minimum(begin + tokens_of_part, L)
    for start in range(begin, end, BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)
        residual = _residual(dense, sparse, rows, stride_dl, stride_sl, end, D)
        r = residual.to(PRODUCT)
        gram = tl.dot(tl.trans(r), r, gram)
        if WITH_CHANGE:
            c = (residual - _known(old_rows, high, low, rows, end, rank, K, PRODUCT)).to(PRODUCT)
            change_gram = tl.dot(tl.trans(c), c, change_gram)
    at = out + ((part.to(tl.int64) * heads + head) * D + ds[:, None]) * D + ds[None, :]
    tl.store(at, gram)
    if WITH_CHANGE:
        tl.store(at + parts.to(tl.int64) * heads * D * D, change_gram)


@triton.jit
def _projected(x, directions, ds, ks, rank, PRODUCT: tl.constexpr):
    """float32 [BLOCK_L, K] of x [BLOCK_L, D]."""
    at = directions + ds[:, None] * rank + ks[None, :]
    high, low = _two_parts(tl.load(at, mask=ks[None, :] < rank, other=0.0), PRODUCT)
    return tl.dot(x, high) + tl.dot(x, low)


@triton.jit(do_not_specialize=["L"])
def _project(
    dense, sparse, old_rows, old_directions, directions, change_directions, out, change_out,
    stride_dh, stride_dl, stride_sh, stride_sl, L, rank,
    D: tl.constexpr, K: tl.constexpr, BLOCK_L: tl.constexpr, WITH_CHANGE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Rows of both terms for one tile of one head."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    ds, ks = tl.arange(0, D), tl.arange(0, K)
    residual = _residual(dense + head * stride_dh, sparse + head * stride_sh, rows, stride_dl, stride_sl, L, D)
    at = (head * L + rows[:, None]) * rank + ks[None, :]
    mask = (rows[:, None] < L) & (ks[None, :] < rank)
    found = _projected(residual.to(PRODUCT), directions + head * D * rank, ds, ks, rank, PRODUCT)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)
    if WITH_CHANGE:
        old = old_directions + head * D * rank + ds[None, :] * rank + ks[:, None]
        high, low = _two_parts(tl.load(old, mask=ks[:, None] < rank, other=0.0), PRODUCT)
        known = _known(old_rows + head * L * rank, high, low, rows, L, rank, K, PRODUCT)
        change = (residual - known).to(PRODUCT)
        found = _projected(change, change_directions + head * D * rank, ds, ks, rank, PRODUCT)
        tl.store(change_out + at, found.to(out.dtype.element_ty), mask=mask)


def launch_factorize_refresh(
    dense: Tensor, sparse: Tensor, rank: int, *, before: Factors | None, iterations: int
) -> tuple[Factors, Factors | None]:
    """See `op.factorize_refresh`; `dense` and `sparse` bf16 or fp16 with D in {16, 32, 64, 128} lying side by side."""
    heads, length, d = dense.shape
    terms = 1 if before is None else 2
    old_rows, old_directions = (dense, dense) if before is None else (x.contiguous() for x in before)
    # About one program of pass 1 a multiprocessor.
    programs = architecture(dense.device).num_multiprocessors
    parts = max(1, min(programs // heads, triton.cdiv(length, GRAM_TOKENS)))
    tokens_of_part = triton.cdiv(triton.cdiv(length, parts), GRAM_TOKENS) * GRAM_TOKENS
    strides = (dense.stride(0), dense.stride(1), sparse.stride(0), sparse.stride(1))
    shape = {
        "D": d,
        "K": max(16, triton.next_power_of_2(rank)),
        "WITH_CHANGE": before is not None,
        "PRODUCT": tl.bfloat16 if dense.is_cuda else tl.float32,  # the interpreter multiplies no bf16
    }
    partial = torch.empty(terms, parts, heads, d, d, dtype=torch.float32, device=dense.device)
    with launching(dense, GRAMS_KIB):
        _grams[(parts, heads)](
            dense, sparse, old_rows, old_directions, partial, *strides, length, rank, tokens_of_part,
            BLOCK_L=GRAM_TOKENS, **shape, num_warps=8,
        )  # fmt: skip
    gram = partial.sum(dim=1, dtype=torch.float64).flatten(0, 1)
    directions = top_directions(gram, rank, iterations).float().unflatten(0, (terms, heads)).contiguous()
    rows = torch.empty(terms, heads, length, rank, dtype=sparse.dtype, device=dense.device)
    with launching(dense):
        _project[(triton.cdiv(length, PROJECTED_TOKENS), heads)](
            dense, sparse, old_rows, old_directions, directions[0], directions[-1], rows[0], rows[-1],
            *strides, length, rank, BLOCK_L=PROJECTED_TOKENS, **shape, num_warps=8,
        )  # fmt: skip
    found = [Factors(rows[i], directions[i]) for i in range(terms)]
    return found[0], found[1] if before is not None else None
