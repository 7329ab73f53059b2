"""The Triton kernel of the column sums against the whole softmax in float64. The reference: tests/reelquant/attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reelquant.attention.column_sums import attention_column_sums
from reelquant.ops.column_sums.op import column_sums
from tests.errors import raises


def naive(q: Tensor, k: Tensor) -> Tensor:
    scores = q.double() @ k.double().transpose(1, 2) / q.shape[-1] ** 0.5
    sums: Tensor = scores.softmax(-1).sum((0, 1))
    return sums


def drawn(
    heads: int, length: int, head_dim: int, *, sharpness: float, fused: bool, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """q and k `[H, L, D]`: contiguous, or columns of one matrix `[L, 2 H D]`."""
    generator = torch.Generator().manual_seed(length)
    x = sharpness * torch.randn(length, 2, heads, head_dim, generator=generator)
    q, k = x.to(device, dtype).permute(1, 2, 0, 3)
    return (q, k) if fused else (q.contiguous(), k.contiguous())


def largest_error(sums: Tensor, q: Tensor, k: Tensor) -> float:
    expected = naive(q, k)
    return float(((sums - expected).abs() / expected.clamp_min(1e-3)).max())


def interpreted_kernel_is_the_definition() -> None:
    from reelquant.ops.band_attention.launch import Load, Tile
    from reelquant.ops.column_sums.kernel import column_sums_triton

    ways: tuple[Load, ...] = ("tma", "pointers")
    for heads, length, head_dim in ((2, 1, 16), (3, 61, 16), (1, 128, 32)):
        for load in ways:
            for fused in (False, True):
                q, k = drawn(heads, length, head_dim, sharpness=2, fused=fused, dtype=torch.float16, device="cpu")
                sums = column_sums_triton(q, k, load=load, tiles=(Tile(32, 16, 4, 2), Tile(64, 32, 4, 2)))
                assert sums.dtype == torch.float64
                assert largest_error(sums, q, k) < 1e-5  # measured: 1.5e-6


def test_the_interpreted_kernel_is_the_definition(interpreted: Callable[[str, str], None]) -> None:
    interpreted(__file__, "interpreted_kernel_is_the_definition")


def test_the_public_function_is_the_operation() -> None:
    q, k = drawn(2, 40, 8, sharpness=1, fused=True, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(attention_column_sums(q, k), column_sums(q, k, implementation="reference"))
    with raises(ValueError, "triton", "cpu"):
        column_sums(q, k, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "length"), [(1, 1), (3, 127), (2, 2049), (5, 1300)])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
@pytest.mark.parametrize("fused", [False, True])
def test_the_kernel_is_the_definition(heads: int, length: int, head_dim: int, dtype: torch.dtype, fused: bool) -> None:
    for sharpness in (1.0, 3.0):
        q, k = drawn(heads, length, head_dim, sharpness=sharpness, fused=fused, dtype=dtype, device="cuda")
        sums = column_sums(q, k, implementation="triton")
        assert sums.dtype == torch.float32
        assert largest_error(sums, q, k) < 1e-4
        assert float(sums.sum(dtype=torch.float64)) == pytest.approx(heads * length, rel=1e-5)
        assert torch.equal(attention_column_sums(q, k), sums)


@pytest.mark.gpu
def test_what_is_not_finite_raises_as_without_the_kernel() -> None:
    q, k = drawn(2, 300, 64, sharpness=1, fused=False, dtype=torch.bfloat16, device="cuda")
    broken = k.clone()
    broken[1, 2, 3] = torch.nan
    with raises(ValueError, "k", 1, 38400):
        column_sums(q, broken, implementation="triton")
    with raises(ValueError, "q", 1):
        column_sums(broken, k, implementation="triton")
    with raises(ValueError, "q", "k", "float32"):
        column_sums(q * 1e25, k * 1e25, implementation="triton")
    with raises(ValueError, "q", "k", torch.float32, torch.bfloat16):
        column_sums(q.float(), k, implementation="triton")
