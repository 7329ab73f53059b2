"""The weight error that the hooks sample, against the definition in float64."""

import pytest
import torch
from torch import Tensor

from reelquant.quantization.quantizer import fake_quantize
from workers import salience_hooks
from workers.salience_hooks import sampled_weight_error


def drawn(n: int, out: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows and a weight with loud channels."""
    generator = torch.Generator().manual_seed(n + out)
    loud = torch.exp(torch.randn(d, generator=generator))
    return torch.randn(n, d, generator=generator) * loud, 0.02 * torch.randn(out, d, generator=generator) / loud.sqrt()


def exact(rows: Tensor, weight: Tensor, bits: int) -> float:
    delta = fake_quantize(weight.float(), bits, 1).double() - weight.double()
    rows = rows.double()
    return float((rows @ delta.T).square().sum() / (rows @ weight.double().T).square().sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_error_is_the_definition(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salience_hooks, "WEIGHT_VALUES", 1000)
    rows, weight = (tensor.to(dtype) for tensor in drawn(17, 45, 130))
    assert float(sampled_weight_error(rows, weight, bits)) == pytest.approx(exact(rows, weight, bits), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "out", "d"), [(1, 4608, 768), (256, 3072, 3072), (256, 3072, 15_360), (100, 999, 1000)])
def test_weight_error_in_16_bits(
    n: int, out: int, d: int, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, weight = (tensor.to(dtype) for tensor in drawn(3 * n, out, d))
    rows = rows[::3]
    expected = exact(rows, weight, bits)
    on_gpu = sampled_weight_error(rows.cuda(), weight.cuda(), bits)
    assert float(on_gpu) == pytest.approx(expected, rel=1e-3)
    assert float(sampled_weight_error(rows, weight, bits)) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(salience_hooks, "HALF_WEIGHT_VALUES", 2**20)
    assert float(sampled_weight_error(rows.cuda(), weight.cuda(), bits)) == pytest.approx(float(on_gpu), rel=1e-4)
    apart = torch.empty(out, 2 * d, dtype=dtype, device="cuda")[:, ::2].copy_(weight)
    assert float(sampled_weight_error(rows.cuda(), apart, bits)) == pytest.approx(float(on_gpu), rel=1e-4)


@pytest.mark.gpu
def test_memory_in_16_bits() -> None:
    rows, weight = (torch.randn(n, 3072, dtype=torch.bfloat16, device="cuda") for n in (256, 30_000))
    sampled_weight_error(rows, weight, 4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sampled_weight_error(rows, weight, 4)
    at_once = salience_hooks.HALF_WEIGHT_VALUES
    # The errors of one piece, and its products with the rows.
    assert torch.cuda.max_memory_allocated() - before < 2 * at_once + 4 * 256 * at_once / 3072 + 2**21
