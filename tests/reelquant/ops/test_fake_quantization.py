"""The kernels of fake quantization against the reference: the same bits forward, gradients up to the order of sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from reelquant.ops.fake_quantization.op import FusedFakeQuantize, fake_quantize, fake_quantize_two_level
from reelquant.ops.fake_quantization.reference import (
    fake_quantize_reference,
    fake_quantize_two_level_reference,
    fit_group_scale,
    in_groups,
    two_level_scale,
)
from reelquant.ops.implementation import reference_only
from reelquant.quantization import quantizer
from reelquant.quantization.quantizer import max_code
from reelquant.quantization.weight_grid import GROUP_SIZE, fake_quantize_weight
from tests.errors import raises

# Of the norm. In 16 bits an element whose sum was rounded otherwise is one unit off.
# Measured, interpreted: 5e-7 in float32, 3e-7 in fp16.
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-4, torch.bfloat16: 2e-3}


class Case(NamedTuple):
    shape: tuple[int, ...]
    bits: int = 4
    clip: str = "one"
    """`number`, `one` for all rows, or `rows`: one each."""
    dtype: torch.dtype = torch.float32


CASES = [
    Case((6, 128)),
    Case((6, 200), 2, "rows", torch.float16),
    Case((2, 3, 130), 3, "rows"),
    Case((5, 1), 5, "number"),
    Case((7, 1100), 6, "number", torch.float16),
    Case((5, 3072), 7),
    Case((5, 5001), 8, "rows"),
]
GPU_CASES = [
    Case((1000, 3072), 6, "one", torch.bfloat16),
    Case((300, 12_288), 4, "number", torch.bfloat16),
    Case((300, 15_360), 8, "one", torch.bfloat16),
    Case((300, 15_360), 2, "rows"),
    Case((300, 12_288), 3, "rows", torch.float16),
    Case((2, 77, 3001), 5, "rows", torch.bfloat16),
    Case((57_857, 128), 7),
    Case((57_857, 3072), 6, "one", torch.bfloat16),
]
WEIGHTS = [
    Case((6, 128), 4, "rows"),
    Case((5, 200), 2, "rows"),
    Case((6, 63), 3, "one", torch.float16),
    Case((5, 2100), 8, "number"),
    Case((6, 1300), 5, "rows"),
]
GPU_WEIGHTS = [
    Case((600, 3072), 4, "rows"),
    Case((100, 12_288), 2, "rows"),
    Case((100, 15_360), 4, "rows"),
    Case((300, 3001), 6, "one"),
    Case((300, 3072), 3, "number", torch.bfloat16),
]


class Found(NamedTuple):
    out: Tensor
    of_x: Tensor
    of_clip: Tensor | None


def drawn(case: Case, *, seed: int, device: str, special: bool) -> tuple[Tensor, Tensor, float | Tensor]:
    """x, the gradient of what comes out, and the clip. `special`: rows of zeros, of a tie, of next to nothing, NaN and inf."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(case.shape, generator=generator) for _ in range(2))
    x[..., ::41] *= 5
    if special:
        rows = x.view(-1, case.shape[-1])
        rows[0] = 0
        rows[1, case.shape[-1] // 2] = -rows[1].abs().max()
        rows[2] *= 1e-38
        rows[3, -1] = torch.nan
        rows[4, -1] = torch.inf
    rows_clip = 0.6 + 0.4 * torch.rand((*case.shape[:-1], 1), generator=generator)
    clips: dict[str, float | Tensor] = {"number": 0.9, "one": torch.tensor([0.8]), "rows": rows_clip}
    clip = clips[case.clip]
    x, grad = x.to(device, case.dtype), grad.to(device, case.dtype)
    return x, grad, clip.to(device) if isinstance(clip, Tensor) else clip


def run(function: Callable[..., Tensor], x: Tensor, grad: Tensor, clip: float | Tensor) -> Found:
    x = x.clone().requires_grad_()
    clip = clip.clone().requires_grad_() if isinstance(clip, Tensor) else clip
    out = function(x, clip)
    out.backward(grad)
    assert x.grad is not None
    return Found(out.detach(), x.grad, clip.grad if isinstance(clip, Tensor) else None)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Of all but the payload of NaN."""
    if a is None or b is None:
        return a is b
    number = a == a
    signs = torch.equal(a.signbit()[number], b.signbit()[number])
    return a.dtype == b.dtype and torch.equal(number, b == b) and torch.equal(a[number], b[number]) and signs


def check_gradients(found: Found, expected: Found, x: Tensor) -> None:
    assert torch.equal(found.of_x.isfinite(), expected.of_x.isfinite())
    # Nothing is summed for elements that have not the row's largest magnitude.
    others = x.abs() != x.abs().amax(-1, keepdim=True)
    finite = expected.of_x.isfinite()
    assert torch.equal(found.of_x[others & finite], expected.of_x[others & finite])
    pairs = [(found.of_x[finite], expected.of_x[finite])]
    if found.of_clip is not None and expected.of_clip is not None:
        assert torch.equal(found.of_clip.isfinite(), expected.of_clip.isfinite())
        finite = expected.of_clip.isfinite()
        pairs.append((found.of_clip[finite], expected.of_clip[finite]))
    for ours, theirs in pairs:
        difference = (ours.double() - theirs.double()).norm()
        assert difference <= GRADIENT_TOLERANCE[found.of_x.dtype] * theirs.double().norm(), float(difference)


def check_rows(case: Case, function: Callable[..., Tensor], *, seed: int, device: str, special: bool) -> Found:
    x, grad, clip = drawn(case, seed=seed, device=device, special=special)
    largest = max_code(case.bits)
    found = run(lambda x, clip: function(x, clip, largest), x, grad, clip)
    expected = run(lambda x, clip: fake_quantize_reference(x, clip, largest, -1), x, grad, clip)
    assert same_bits(found.out, expected.out)
    check_gradients(found, expected, x)
    return found


def check_weight(
    case: Case, function: Callable[..., Tensor], group_scale_of: Callable[..., Tensor], *, seed: int, device: str
) -> Found:
    largest = max_code(case.bits)
    for special in (False, True):
        weight, grad, clip = drawn(case, seed=seed, device=device, special=special)
        found = run(lambda x, clip: function(x, clip, largest), weight, grad, clip)
        expected = run(
            lambda x, clip: fake_quantize_two_level_reference(x, clip, largest, GROUP_SIZE), weight, grad, clip
        )
        finite = weight.isfinite().all(1)
        chosen = group_scale_of(weight, clip, largest)[finite].float()
        groups = in_groups(weight[finite].float(), GROUP_SIZE)
        scale = two_level_scale(weight.float(), clip, largest)[finite]
        best = fit_group_scale(groups, scale, largest)
        errors = [squared_error(groups, of_groups * scale, largest) for of_groups in (chosen, best)]
        other = chosen != best
        assert torch.allclose(errors[0][other], errors[1][other], rtol=1e-5, atol=0)
        assert other.float().mean() < 1e-3
        if not other.any():
            assert same_bits(found.out, expected.out)
            check_gradients(found, expected, weight)
    return found


def squared_error(groups: Tensor, step: Tensor, largest: int) -> Tensor:
    values, step = groups.double(), step.double()[:, :, None]
    rounded: Tensor = (values / step).round().clamp(-largest, largest) * step
    return (rounded - values).square().sum(2)


def interpreted_kernels() -> None:
    from reelquant.ops.fake_quantization.kernel import launch_fake_quantize, launch_fake_quantize_backward

    library = torch.library.Library("reelquant", "IMPL")
    library.impl("fake_quantize", launch_fake_quantize, "CPU")
    library.impl("fake_quantize_backward", launch_fake_quantize_backward, "CPU")

    def fused(x: Tensor, clip: float | Tensor, largest: int, group_size: int = 0) -> Tensor:
        factor = clip if isinstance(clip, Tensor) else torch.tensor([clip])
        result: Tensor = FusedFakeQuantize.apply(x, factor, largest, group_size)  # type: ignore[no-untyped-call]
        return result

    def grouped(x: Tensor, clip: float | Tensor, largest: int) -> Tensor:
        return fused(x, clip, largest, GROUP_SIZE)

    def group_scale_of(x: Tensor, clip: float | Tensor, largest: int) -> Tensor:
        factor = clip if isinstance(clip, Tensor) else torch.tensor([clip])
        return launch_fake_quantize(x, factor, largest, GROUP_SIZE)[2]

    for seed, case in enumerate(CASES):
        for special in (False, True):
            check_rows(case, fused, seed=seed, device="cpu", special=special)
    for seed, case in enumerate(WEIGHTS):
        check_weight(case, grouped, group_scale_of, seed=seed, device="cpu")

    # A step of 2 and one of 3 leave the same squared error, 1: the upper one stays.
    weight = torch.zeros(1, 128)
    weight[0, 0], weight[0, 64], weight[0, 65] = 126, 15, 4
    assert group_scale_of(weight, 1.0, 7).tolist() == [[18, 3]]
    assert grouped(weight, 1.0, 7)[0, [0, 64, 65]].tolist() == [126, 15, 3]
    assert fake_quantize_two_level(weight, 1.0, 7, GROUP_SIZE)[0, [0, 64, 65]].tolist() == [126, 15, 3]

    # A clip alone that learns.
    clip = torch.full((3, 1), 0.7, requires_grad=True)
    for function, reference in (
        (fused, lambda x, clip, largest: fake_quantize_reference(x, clip, largest, 1)),
        (grouped, lambda x, clip, largest: fake_quantize_two_level_reference(x, clip, largest, GROUP_SIZE)),
    ):
        x = torch.randn(3, 150, generator=torch.Generator().manual_seed(1))
        ours, theirs = (torch.autograd.grad(f(x, clip, 7).square().sum(), clip)[0] for f in (function, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_the_interpreted_kernels_are_the_reference(interpreted: Callable[[str, str], None]) -> None:
    interpreted(__file__, "interpreted_kernels")


def test_on_the_meta_device_the_kernels_stand_for_those_of_a_gpu() -> None:
    x = torch.empty(4, 100, dtype=torch.bfloat16, device="meta", requires_grad=True)
    clip = torch.empty(4, 1, device="meta", requires_grad=True)
    functions: list[Callable[[], Tensor]] = [
        lambda: fake_quantize(x, clip, 7, 1),
        lambda: fake_quantize_two_level(x, clip, 7, GROUP_SIZE),
    ]
    for function in functions:
        out = function()
        assert type(out.grad_fn).__name__ == "FusedFakeQuantizeBackward"
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        of_x, of_clip = torch.autograd.grad(out.sum(), [x, clip])
        assert (of_x.shape, of_x.dtype, of_clip.shape) == (x.shape, x.dtype, clip.shape)
        with reference_only():
            assert type(function().grad_fn).__name__ != "FusedFakeQuantizeBackward"


def test_what_the_kernels_do_not_take() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    cases: list[tuple[Tensor, float | Tensor, int, tuple[object, ...]]] = [
        (meta(4, 100), meta(4, 1), 0, ("dim 0",)),
        (meta(4, 100, dtype=torch.float64), 1.0, 1, (torch.float64, [4, 100])),
        (meta(100, 4).T, 1.0, 1, ("contiguous", [4, 100])),
        (meta(4, 16_385), 1.0, 1, (16384, [4, 16385])),
        (meta(4, 100), meta(1, dtype=torch.float64), 1, ("clip", torch.float64)),
        (meta(4, 3, 100), meta(3, 1), 2, ("clip", [4, 3, 1], [3, 1])),
    ]
    for x, clip, dim, words in cases:
        with raises(ValueError, "triton", *words):
            fake_quantize(x, clip, 7, dim, implementation="triton")
    assert fake_quantize(meta(4, 3, 100), meta(3, 1), 7, 2).shape == (4, 3, 100)
    with raises(ValueError, "triton", 48, 16, 128):
        fake_quantize_two_level(meta(4, 96), 1.0, 7, 48, implementation="triton")
    with raises(ValueError, "triton", "cpu"):
        fake_quantize(torch.ones(4, 100), 1.0, 7, 1, implementation="triton")
    with raises(ValueError, "clip", 0.0):
        fake_quantize(meta(4, 100), 0.0, 7, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_rows(case: Case) -> None:
    def fused(x: Tensor, clip: float | Tensor, largest: int) -> Tensor:
        return fake_quantize(x, clip, largest, -1, implementation="triton")

    for special in (False, True):
        found = check_rows(case, fused, seed=1, device="cuda", special=special)
        assert all(map(same_bits, found, check_rows(case, fused, seed=1, device="cuda", special=special)))
    x, _, clip = drawn(case, seed=1, device="cpu", special=True)
    assert same_bits(found.out.cpu(), fake_quantize(x, clip, max_code(case.bits), -1))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_WEIGHTS)
def test_weights(case: Case) -> None:
    def fused(x: Tensor, clip: float | Tensor, largest: int) -> Tensor:
        return fake_quantize_two_level(x, clip, largest, GROUP_SIZE, implementation="triton")

    def group_scale_of(x: Tensor, clip: float | Tensor, largest: int) -> Tensor:
        factor = clip if isinstance(clip, Tensor) else torch.tensor([clip], device=x.device)
        chosen: Tensor = torch.ops.reelquant.fake_quantize(x, factor, largest, GROUP_SIZE)[2]
        return chosen

    found = check_weight(case, fused, group_scale_of, seed=1, device="cuda")
    assert all(map(same_bits, found, check_weight(case, fused, group_scale_of, seed=1, device="cuda")))


@pytest.mark.gpu
def test_on_a_gpu_the_public_functions_take_the_kernels() -> None:
    x = torch.randn(50, 300, device="cuda", requires_grad=True)
    functions: list[Callable[[], Tensor]] = [
        lambda: quantizer.fake_quantize(x, 4, -1, 0.9),
        lambda: fake_quantize_weight(x, 4, 0.9, "per_channel"),
        lambda: fake_quantize_weight(x, 4, 0.9, "two_level"),
    ]
    for function in functions:
        out = function()
        assert type(out.grad_fn).__name__ == "FusedFakeQuantizeBackward"
        with reference_only():
            expected = function()
        assert type(expected.grad_fn).__name__ != "FusedFakeQuantizeBackward"
        assert same_bits(out, expected)


@pytest.mark.gpu
def test_gradients_that_are_not_contiguous() -> None:
    x = torch.randn(50, 300, device="cuda", requires_grad=True)
    expected = torch.autograd.grad(fake_quantize(x, 1.0, 7, 1, implementation="reference").sum(), x)[0]
    found = torch.autograd.grad(fake_quantize(x, 1.0, 7, 1, implementation="triton").sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
