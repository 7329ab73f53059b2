from __future__ import annotations

import pytest
import torch

from reelquant.calibration import salience
from reelquant.calibration.salience import (
    diffusion_salience,
    minmax,
    quantization_salience,
    select_salient,
    spectral_norm_gram,
    weight_error,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusion_salience_is_the_formula(dtype: torch.dtype) -> None:
    latents = torch.randn(6, 3, 5, 7).to(dtype)
    wide = latents.double()
    expected = [float((wide[t] - wide[t - 1]).square().sum() / wide[t].square().sum()) for t in range(1, 6)]
    got = diffusion_salience(latents)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected))


def test_diffusion_salience_of_zero_and_broken_latents() -> None:
    assert diffusion_salience(torch.zeros(3, 4)).tolist() == [0.0, 0.0]
    latents = torch.ones(3, 4)
    latents[2] = 0
    with pytest.raises(ValueError, match=r"latents\[2\] is zero throughout"):
        diffusion_salience(latents)
    latents[1, 1] = torch.inf
    with pytest.raises(ValueError, match="latents holds 1 NaN or infinite"):
        diffusion_salience(latents)
    with pytest.raises(ValueError, match=r"\[T \+ 1, ...\]"):
        diffusion_salience(torch.ones(1, 4))


def spectrum(kind: str, num: int, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num + d)
    x = torch.randn(num, d, generator=generator)
    if kind == "outliers":
        x = x * torch.exp(1.5 * torch.randn(d, generator=generator)) + 2
    return x


@pytest.mark.parametrize("kind", ["gaussian", "outliers"])
@pytest.mark.parametrize(("num", "d"), [(1, 9), (513, 3), (5000, 65), (37, 1500), (1031, 1101), (1400, 1030)])
def test_spectral_norm(kind: str, num: int, d: int) -> None:
    x = spectrum(kind, num, d)
    got = spectral_norm_gram(x)
    assert got.shape == ()
    assert got.dtype == torch.float32
    error = abs(float(got) / float(torch.linalg.matrix_norm(x.double(), 2)) ** 2 - 1)
    assert error < 1e-5, error  # measured: below 5e-7
    assert torch.equal(quantization_salience(x), got)


def test_spectral_norm_of_degenerate_wide_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salience, "LARGEST_DENSE_GRAM", 8)
    assert float(spectral_norm_gram(torch.zeros(20, 30))) == 0.0
    assert float(spectral_norm_gram(3 * torch.eye(40))) == pytest.approx(9.0)
    rank_one = torch.outer(torch.arange(1.0, 31), torch.arange(1.0, 21))
    assert float(spectral_norm_gram(rank_one)) == pytest.approx(float(rank_one.square().sum()), rel=1e-6)
    double = torch.randn(50, 60, dtype=torch.float64)
    assert float(spectral_norm_gram(double)) == pytest.approx(float(torch.linalg.matrix_norm(double, 2)) ** 2, rel=1e-6)
    narrow = double.to(torch.bfloat16)
    expected = float(torch.linalg.matrix_norm(narrow.double(), 2)) ** 2
    assert float(spectral_norm_gram(narrow)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_spectral_norm_on_a_gpu(dtype: torch.dtype) -> None:
    x = spectrum("outliers", 5000, 1536).to(dtype)
    expected = float(torch.linalg.matrix_norm(x.double(), 2)) ** 2
    assert float(spectral_norm_gram(x.cuda())) == pytest.approx(expected, rel=1e-5)


def test_spectral_norm_refuses_nan_and_other_shapes() -> None:
    with pytest.raises(ValueError, match="tokens holds 1 NaN"):
        spectral_norm_gram(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match=r"\[L, d\]"):
        spectral_norm_gram(torch.ones(3))


def test_minmax() -> None:
    torch.testing.assert_close(minmax(torch.tensor([[2.0, 4.0], [3.0, 6.0]])), torch.tensor([[0, 0.5], [0.25, 1]]))
    assert minmax(torch.full((4,), -3.0)).tolist() == [1.0] * 4
    assert minmax(torch.tensor([-3e38, 0.0, 3e38])).tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="x is empty"):
        minmax(torch.empty(0))


def test_select_salient_takes_the_largest_products() -> None:
    c_diff, c_quant = torch.rand(101), torch.rand(101) * 1e6 + 5
    score = (c_diff - c_diff.min()) * (c_quant - c_quant.min())
    chosen = select_salient(c_diff, c_quant, 17)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == score.argsort(descending=True)[:17].tolist()


def test_select_salient_with_a_constant_side_and_ties() -> None:
    c_diff = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert select_salient(c_diff, torch.full((4,), 7.0), 3).tolist() == [1, 3, 2]
    assert select_salient(torch.ones(4), torch.ones(4), 4).tolist() == [0, 1, 2, 3]


def test_select_salient_errors() -> None:
    ones = torch.ones(4)
    for num in (0, 5):
        with pytest.raises(ValueError, match=f"cannot select {num} of 4 candidates"):
            select_salient(ones, ones, num)
    with pytest.raises(ValueError, match="c_quant holds 1 NaN"):
        select_salient(ones, torch.tensor([1.0, torch.nan, 1.0, 1.0]), 2)
    with pytest.raises(ValueError, match=r"must both be \[M\]"):
        select_salient(ones, ones[:3], 2)


def test_weight_error_is_the_relative_output_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salience, "CHUNK_ROWS", 10)
    x, weight = torch.randn(33, 12), torch.randn(7, 12)
    rounded = (weight * 4).round() / 4
    out, wrong = x.double() @ weight.double().T, x.double() @ rounded.double().T
    expected = float((out - wrong).square().sum() / out.square().sum())
    assert float(weight_error(x, weight, rounded)) == pytest.approx(expected, rel=1e-5)
    assert float(weight_error(x, weight, weight)) == 0.0


def test_weight_error_errors() -> None:
    x, weight = torch.randn(33, 12), torch.randn(7, 12)
    with pytest.raises(ValueError, match="quantized_weight holds 84 NaN"):
        weight_error(x, weight, weight * torch.nan)
    with pytest.raises(ValueError, match="zero throughout"):
        weight_error(0 * x, weight, weight)
    with pytest.raises(ValueError, match=r"got \(33, 12\), \(7, 11\)"):
        weight_error(x, weight[:, :11], weight)
