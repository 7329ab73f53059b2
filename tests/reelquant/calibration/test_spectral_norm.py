"""Largest eigenvalues against those of whole decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reelquant.calibration import spectral_norm
from reelquant.calibration.salience import quantization_salience
from reelquant.calibration.spectral_norm import SpectralNorms, spectral_norm_gram
from tests.errors import raises


def exact(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.double(), 2)) ** 2


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
    monkeypatch.setattr(spectral_norm, "LARGEST_DENSE_GRAM", 8)
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
    with raises(ValueError, "tokens", 1, 2):
        spectral_norm_gram(torch.tensor([[1.0, torch.nan]]))
    with raises(ValueError, "tokens", "[L, d]", (3,)):
        spectral_norm_gram(torch.ones(3))


def mixed_inputs() -> list[Tensor]:
    """More than two batches, some of which are solved alone: narrow, short, and of another width."""
    inputs = [spectrum(kind, 40 + i, 20) for i in range(10) for kind in ("gaussian", "outliers")]
    return [
        *inputs,
        torch.zeros(30, 20),
        spectrum("outliers", 50, 8),
        spectrum("gaussian", 10, 20),
        spectrum("gaussian", 70, 24),
    ]


def add_in_parts(norms: SpectralNorms, x: Tensor) -> None:
    norms.add(x[: len(x) // 3], x[len(x) // 3 : -1], x[:0], x[-1:])


def test_norms_of_many_inputs_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = SpectralNorms()
    inputs = mixed_inputs()
    for _ in range(2):
        for x in inputs:
            add_in_parts(norms, x)
        taken = norms.take()
        assert taken.dtype == torch.float32
        assert torch.equal(taken, torch.stack([spectral_norm_gram(x) for x in inputs]))
    with raises(ValueError, "tokens", 1, 9):
        norms.add(torch.zeros(2, 3), torch.tensor([[1.0, torch.nan, 0.0]]))
    with raises(ValueError, (2, 3), (2, 4)):
        norms.add(torch.zeros(2, 3), torch.zeros(2, 4))


def form_grams_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the product of the tensor cores."""

    def add(gram: Tensor, parts: tuple[Tensor, ...]) -> None:
        for part in parts:
            gram += part.T @ part

    monkeypatch.setattr(spectral_norm, "LARGEST_DENSE_GRAM", 8)
    monkeypatch.setattr(spectral_norm, "_add_to_gram", add)
    monkeypatch.setattr(spectral_norm, "_forms_gram", lambda parts: sum(map(len, parts)) >= parts[0].shape[1] > 8)


def test_gram_matrices_are_worked_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    form_grams_on_a_cpu(monkeypatch)
    norms, inputs = SpectralNorms(), mixed_inputs()
    for _ in range(2):
        for x in inputs:
            add_in_parts(norms, x)
        for found, x in zip(norms.take().tolist(), inputs, strict=True):
            assert found == pytest.approx(exact(x), rel=1e-5)  # measured: below 3e-7
    assert norms._grams is None
    assert float(spectral_norm_gram(inputs[1])) == pytest.approx(exact(inputs[1]), rel=1e-5)


def test_steps_go_on_until_all_have_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    form_grams_on_a_cpu(monkeypatch)
    norms = SpectralNorms()
    rank_one = torch.outer(torch.arange(1.0, 401), torch.arange(1.0, 301))
    flat = torch.linalg.qr(spectrum("gaussian", 400, 300))[0] * torch.linspace(1.0, 1.1, 300)
    inputs = [rank_one, flat, 3 * torch.eye(400, 300), spectrum("gaussian", 400, 300)]
    for x in inputs:
        norms.add(x)
    for found, x in zip(norms.take().tolist(), inputs, strict=True):
        assert found == pytest.approx(exact(x), rel=1e-5)  # measured: below 2e-6


def test_what_is_not_finite_is_an_error_though_the_input_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    form_grams_on_a_cpu(monkeypatch)
    for value in (torch.nan, torch.inf, -torch.inf, 1e25):
        norms = SpectralNorms()
        for place in range(3):
            x = spectrum("gaussian", 30, 20)
            x[4, 5] = value if place != 1 else 0
            norms.add(x)
        with raises(ValueError, [0, 2]):
            norms.take()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_of_many_inputs_on_a_gpu(dtype: torch.dtype) -> None:
    inputs = [spectrum("outliers", 5000 + 7 * i, 1536).to(dtype) for i in range(10)]
    inputs += [spectrum("gaussian", 3000, 600).to(dtype), spectrum("gaussian", 2500, 1100).to(dtype)]
    norms = SpectralNorms()
    for x in inputs:
        add_in_parts(norms, x.cuda())
    for found, x in zip(norms.take().tolist(), inputs, strict=True):
        assert found == pytest.approx(exact(x), rel=1e-5)


@pytest.mark.gpu
def test_what_is_not_finite_is_an_error_on_a_gpu() -> None:
    x = spectrum("gaussian", 5000, 1536).bfloat16().cuda()
    norms = SpectralNorms()
    norms.add(x)
    x[4999, 7] = torch.inf
    norms.add(x)
    with raises(ValueError, [1]):
        norms.take()
    with raises(ValueError, "tokens", 1):
        spectral_norm_gram(x)


@pytest.mark.gpu
def test_gram_matrices_are_all_that_waits_on_a_gpu() -> None:
    x = spectrum("gaussian", 8192, 1536).bfloat16().cuda()
    norms = SpectralNorms()
    norms.add(x)
    norms.take()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(spectral_norm.GRAMS_AT_ONCE - 1):
        norms.add(x)
    grams = spectral_norm.GRAMS_AT_ONCE * 1536**2 * 4
    assert torch.cuda.max_memory_allocated() - before < grams + 2**20
    norms.take()
    assert torch.cuda.memory_allocated() - before < 2**20
