"""What rounding changes in a weight: bit-exact, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reelquant.ops.rounding_error import reference
from reelquant.ops.rounding_error.op import rounding_error
from reelquant.quantization.quantizer import fake_quantize
from tests.errors import raises

ALL_BITS = (2, 3, 4, 6, 8)


def weights(n: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Contiguous and not: Gaussian with a loud column, values at the very middle between two codes, a row of zeros."""
    generator = torch.Generator().manual_seed(n + d)
    weight = 0.02 * torch.randn(n, d, generator=generator)
    weight[:, d // 2] *= 9
    middles = torch.randint(-14, 15, (n, d), generator=generator) / 2
    middles[:, 0] = 7
    middles[n // 2] = 0
    wide = torch.randn(n, 2 * d + 3, generator=generator).to(dtype)
    return [weight.to(dtype), middles.to(dtype), wide[:, 1 : d + 1], wide[:, 1 : 2 * d + 1 : 2], wide.T[:n, :d]]


def check(run: Callable[..., Tensor], shapes: list[tuple[int, int]], *, device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for n, d in shapes:
            for bits in ALL_BITS:
                for weight in weights(n, d, dtype):
                    wide = weight.float()
                    expected = (fake_quantize(wide, bits, 1) - wide).to(dtype)
                    whole = weight.as_strided((weight.untyped_storage().nbytes() // 2,), (1,), 0).to(device)
                    given = whole.as_strided(weight.shape, weight.stride(), weight.storage_offset())
                    found = run(given, bits=bits)
                    assert found.dtype == dtype
                    assert found.is_contiguous()
                    assert torch.equal(found.cpu(), expected), (dtype, weight.shape, weight.stride(), bits)


def test_is_the_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_VALUES", 400)
    check(rounding_error, [(1, 1), (7, 100)], device="cpu")
    weight = torch.randn(5, 33)
    assert torch.equal(rounding_error(weight, bits=4), fake_quantize(weight, 4, 1) - weight)


def test_errors() -> None:
    for weight in (torch.zeros(3), torch.zeros(3, 0), torch.zeros(3, 4, dtype=torch.float64)):
        with raises(ValueError, "weight", weight.dtype, list(weight.shape)):
            rounding_error(weight, bits=4)
    with raises(ValueError, "bits", "got 16"):
        rounding_error(torch.zeros(3, 4), bits=16)
    with raises(ValueError, "triton", "cpu"):
        rounding_error(torch.zeros(3, 4).bfloat16(), bits=4, implementation="triton")


def test_the_kernel_interpreted(interpreted: Callable[[str, str], None]) -> None:
    interpreted(__file__, "interpreted_kernel")


def launch(weight: Tensor, *, bits: int) -> Tensor:
    from reelquant.ops.rounding_error.kernel import launch_rounding_error

    out = torch.full(weight.shape, 99.0, dtype=weight.dtype, device=weight.device)
    return launch_rounding_error(weight, bits=bits, out=out, block=64)


def interpreted_kernel() -> None:
    check(launch, [(1, 1), (3, 150)], device="cpu")
    check_what_is_not_finite(launch, device="cpu")


def check_what_is_not_finite(run: Callable[..., Tensor], *, device: str) -> None:
    weight = torch.randn(4, 150).bfloat16()
    weight[0, 7], weight[1, 149], weight[2, 0] = torch.nan, torch.inf, -torch.inf
    found = run(weight.to(device), bits=4).cpu()
    assert found[:3].isnan().all()
    assert torch.equal(found[3], rounding_error(weight, bits=4)[3])
    assert rounding_error(weight, bits=4)[:3].isnan().all()


@pytest.mark.gpu
def test_the_kernel() -> None:
    def run(weight: Tensor, *, bits: int) -> Tensor:
        return rounding_error(weight, bits=bits, implementation="triton")

    check(run, [(1, 1), (77, 100), (131, 3072), (5, 12_288), (9, 15_360)], device="cuda")
    check_what_is_not_finite(run, device="cuda")
    with raises(ValueError, "weight", torch.float32):
        run(torch.zeros(3, 4, device="cuda"), bits=4)


@pytest.mark.gpu
def test_the_kernel_on_a_large_weight() -> None:
    weight = torch.randn(700_000, 3200, device="cuda", dtype=torch.bfloat16)  # more than 2^31 values
    found = rounding_error(weight, bits=4, implementation="triton")
    for rows in (slice(0, 3), slice(699_990, 700_000)):
        assert torch.equal(found[rows].cpu(), rounding_error(weight[rows].cpu(), bits=4))
