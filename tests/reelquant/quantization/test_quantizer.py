from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reelquant.ops.fake_quantization.reference import SMALLEST_SCALE
from reelquant.quantization.quantizer import fake_quantize, max_code, quantize
from tests.errors import raises


@given(bits=st.integers(2, 8), rows=st.integers(1, 5), width=st.integers(1, 33), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_error_is_at_most_half_a_step_and_codes_stay_symmetric(bits: int, rows: int, width: int, seed: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    codes, scale = quantize(x, bits, -1)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (rows, 1)
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
    assert float(((codes * scale - x).abs() / scale).max()) <= 0.5 + 1e-5
    torch.testing.assert_close(fake_quantize(x, bits, -1), codes * scale, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_dim_is_the_axis_that_shares_a_scale(dim: int) -> None:
    x = torch.randn(3, 5, 7)
    torch.testing.assert_close(quantize(x, 6, dim)[1], x.abs().amax(dim, keepdim=True) / 31)


def test_clip_clamps_to_the_symmetric_range() -> None:
    codes, scale = quantize(torch.tensor([[-4.0, 4.0, 1.1, 0.1]]), 4, 1, clip=0.5)
    assert codes.tolist() == [[-7, 7, 4, 0]]
    assert float(scale) == pytest.approx(2.0 / 7)


def test_zero_rows_and_narrow_dtypes() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -3.0]], dtype=torch.bfloat16)
    codes, scale = quantize(x, 8, 1)
    assert codes.tolist() == [[0, 0], [42, -127]]
    assert bool((scale > 0).all())
    out = fake_quantize(x.requires_grad_(), 8, 1)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert quantize(torch.full((1, 3), torch.nan), 8, 1)[1].isnan().all()


def test_gradient_of_x_is_straight_through() -> None:
    x = torch.tensor([[0.3, -0.2, 1.1, 5.0, -2.0]], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    fake_quantize(x, 4, 1, 0.3).backward(upstream)
    # Range +-1.5: 5.0 and -2.0 are clamped; the largest element moves the range itself by clip times the slopes.
    step = 1.5 / 7
    slope = torch.tensor([round(v / step) - v / step for v in (0.3, -0.2, 1.1)] + [7.0, -7.0], dtype=torch.float64)
    through_scale = float((upstream * slope).sum()) * 0.3 / 7
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 2.0, 3.0, through_scale, 0.0]], dtype=torch.float64))


def test_gradient_of_clip_is_that_of_the_scale() -> None:
    x = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    clip = torch.full((6, 1), 0.7, dtype=torch.float64, requires_grad=True)
    out = fake_quantize(x, 4, 1, clip)
    out.sum().backward()
    scale = x.abs().amax(1, keepdim=True) * 0.7 / 7
    steps = x / scale
    codes = steps.round().clamp(-7, 7)
    slope = torch.where(steps.round().abs() <= 7, codes - steps, codes)
    expected = slope.sum(1, keepdim=True) * x.abs().amax(1, keepdim=True) / 7
    assert clip.grad is not None
    torch.testing.assert_close(clip.grad, expected)


def test_the_largest_element_is_not_taken_for_clamped() -> None:
    x = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = fake_quantize(x, 8, 1)
    values.sum().backward()
    scale = x.detach().abs().amax(1, keepdim=True) / 127
    slope = ((x.detach() / scale).round() - x.detach() / scale).sum(1)
    assert x.grad is not None
    largest = x.grad.gather(1, x.detach().abs().argmax(1, keepdim=True))[:, 0]
    sign = x.detach().gather(1, x.detach().abs().argmax(1, keepdim=True))[:, 0].sign()
    torch.testing.assert_close(largest, 1 + sign * slope / 127, rtol=1e-4, atol=1e-4)


def test_sixteen_bits_is_the_identity() -> None:
    x = torch.randn(2, 3)
    assert fake_quantize(x, 16, 1) is x


@pytest.mark.parametrize("bits", [0, 1, 9, 16, -4])
def test_bits_out_of_range(bits: int) -> None:
    with raises(ValueError, "bits", bits):
        max_code(bits)
    with raises(ValueError, "bits", bits):
        quantize(torch.ones(1, 2), bits, 1)


def test_other_errors_name_the_value() -> None:
    with raises(ValueError, "clip", 0.0):
        fake_quantize(torch.ones(2, 2), 4, 1, 0.0)
    with raises(ValueError, "clip", (3, 1), (1, 1)):
        fake_quantize(torch.ones(1, 2), 4, 1, torch.ones(3, 1))
    with raises(ValueError, "x", torch.int64):
        fake_quantize(torch.ones(2, 2, dtype=torch.int64), 4, 1)


def plainly_fake_quantized(x: Tensor, bits: int, dim: int, clip: float | Tensor) -> Tensor:
    """By operations that autograd knows; straight-through by `x - x.detach()`."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = max_code(bits)
    scale = (values.abs().amax(dim, keepdim=True) * clip / largest).clamp_min(SMALLEST_SCALE)
    steps = values / scale
    inside = steps.detach().round().abs() <= largest
    codes = steps.detach().round().clamp(-largest, largest)
    # Inside: code + (steps - steps) passes the gradient of steps on; outside nothing but the scale has one.
    passed = codes + torch.where(inside, steps - steps.detach(), torch.zeros_like(steps))
    return (passed * scale).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [1.0, torch.tensor([0.7]), torch.linspace(0.5, 1, 40)[:, None]])
def test_gradients_are_those_of_plain_operations(dtype: torch.dtype, clip: float | Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn, grad = (torch.randn(40, 96, generator=generator).to(dtype) for _ in range(2))
    drawn[3], drawn[:, ::7] = 0, drawn[:, ::7] * 9
    drawn[5, 2] = -drawn[5].abs().max()  # two elements have the largest magnitude
    found: list[list[Tensor]] = []
    for function in (fake_quantize, plainly_fake_quantized):
        x = drawn.clone().requires_grad_()
        factor = clip.clone().to(torch.promote_types(dtype, torch.float32)) if isinstance(clip, Tensor) else clip
        learned = [x, factor.requires_grad_()] if isinstance(factor, Tensor) else [x]
        out = function(x, 4, 1, factor)
        found.append([out.detach(), *torch.autograd.grad(out, learned, grad)])
    tight = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).norm() <= tight * plain.norm()


def test_a_learning_step_keeps_the_input_as_it_came_and_nothing_else_of_its_size() -> None:
    x = torch.randn(64, 512, dtype=torch.bfloat16).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fake_quantize(x, 4, -1, torch.ones(1, requires_grad=True))
    assert sum(kept.values()) <= x.nbytes + 3 * 64 * 4
