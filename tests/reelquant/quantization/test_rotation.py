from __future__ import annotations

import pytest
import torch

from reelquant.quantization.rotation import (
    block_size,
    cayley,
    hadamard,
    rotate_blocks,
    transform_input,
    transform_weight,
)
from tests.errors import raises


@pytest.mark.parametrize(
    ("d", "expected"), [(1, 1), (7, 1), (192, 64), (3072, 128), (12288, 128), (96, 32), (5120, 128)]
)
def test_block_size(d: int, expected: int) -> None:
    assert block_size(d) == expected


def test_block_size_of_another_largest() -> None:
    assert block_size(3072, largest=32) == 32
    with raises(ValueError, "largest", 96):
        block_size(3072, largest=96)
    with raises(ValueError, "d", 0):
        block_size(0)


@pytest.mark.parametrize("n", [1, 2, 8, 128])
def test_hadamard_is_orthogonal_and_flat(n: int) -> None:
    matrix = hadamard(n)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix.double() @ matrix.double(), torch.eye(n).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.abs(), torch.full((n, n), n**-0.5))


def test_hadamard_of_no_power_of_two() -> None:
    with raises(ValueError, "n", 12):
        hadamard(12)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 100.0])
def test_cayley_is_orthogonal_however_large_its_argument(size: float) -> None:
    a = size * torch.randn(33, 33, generator=torch.Generator().manual_seed(0))
    rotation = cayley(a)
    error = float((rotation @ rotation.T - torch.eye(33)).abs().max())
    assert error < 1e-4, error  # measured: 1.6e-5 at 100, 6e-7 at 1
    assert float(torch.linalg.det(rotation)) == pytest.approx(1.0, abs=1e-3)
    if size == 0.0:
        assert torch.equal(rotation, torch.eye(33))
    assert cayley(a.to(torch.bfloat16)).dtype == torch.float32


def test_cayley_is_differentiable() -> None:
    a = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cayley, (a,))


def test_rotate_blocks_is_the_block_diagonal_product() -> None:
    x, rotation = torch.randn(3, 5, 24, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    torch.testing.assert_close(rotate_blocks(x, rotation), x @ torch.block_diag(rotation, rotation, rotation))
    transposed = x.transpose(0, 1)
    torch.testing.assert_close(rotate_blocks(transposed, rotation), rotate_blocks(x, rotation).transpose(0, 1))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("d", [192, 320])
def test_the_pair_is_exact_with_the_rounded_matrix(scaled: bool, rotated: bool, d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    b = block_size(d)
    x = torch.randn(11, d, generator=generator) * torch.exp(2 * torch.randn(d, generator=generator))
    weight = torch.randn(17, d, generator=generator)
    scale = torch.exp(torch.randn(d, generator=generator)) if scaled else None
    learned = hadamard(b) @ cayley(0.3 * torch.randn(b, b, generator=generator))
    rotation = learned.to(torch.bfloat16) if rotated else None
    expected = x.double() @ weight.double().T
    got = transform_input(x.double(), scale, rotation) @ transform_weight(weight.double(), scale, rotation).T
    error = float((got - expected).norm() / expected.norm())
    assert error < 1e-13, error  # measured: up to 7.5e-15
    single = transform_input(x, scale, rotation) @ transform_weight(weight, scale, rotation).T
    error = float((single - expected).norm() / expected.norm())
    assert error < 5e-6, error  # measured: up to 1.5e-6, from the float32 products
    if rotation is not None:
        # The transpose in place of the inverse would be off by bfloat16's rounding.
        naive = transform_weight(weight.double(), scale, None) @ torch.block_diag(*[rotation.double()] * (d // b))
        wrong = transform_input(x.double(), scale, rotation) @ naive.T
        assert float((wrong - expected).norm() / expected.norm()) > 1e-4


def test_dtypes() -> None:
    x, scale = torch.randn(3, 16, dtype=torch.bfloat16), torch.rand(16) + 0.5
    assert transform_input(x, scale, hadamard(16)).dtype == torch.bfloat16
    assert transform_input(x, None, None) is x
    assert transform_weight(x, None, None).dtype == torch.float32
    assert transform_weight(x.double(), scale, None).dtype == torch.float64


def test_gradients_reach_scale_and_rotation() -> None:
    weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(8, dtype=torch.float64) + 0.5).requires_grad_()
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0].requires_grad_()
    assert torch.autograd.gradcheck(transform_weight, (weight, scale, rotation))
    assert torch.autograd.gradcheck(transform_input, (weight, scale, rotation))


def test_errors() -> None:
    with raises(ValueError, 16, (3, 24)):
        rotate_blocks(torch.ones(3, 24), torch.eye(16))
    with raises(ValueError, "rotation", (2, 3)):
        rotate_blocks(torch.ones(3, 24), torch.ones(2, 3))
    with raises(ValueError, "channel_scale", [24], (1,)):
        transform_input(torch.ones(3, 24), torch.ones(1), None)
    with raises(ValueError, "weight", (24,)):
        transform_weight(torch.ones(24), None, None)
