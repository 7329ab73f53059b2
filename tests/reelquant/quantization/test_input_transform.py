"""The transform in front of quantized layers, and a thread's least activation bits."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from reelquant.quantization.input_transform import (
    QuantizedInput,
    current_activation_bits,
    least_activation_bits,
    quantized_input,
)
from reelquant.quantization.quantizer import quantize
from reelquant.quantization.rotation import hadamard

X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
PARTS = {
    "channel_scale": torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5,
    "rotation": hadamard(8).bfloat16(),
    "activation_clip": torch.tensor([0.9]),
}


def transformed(x: Tensor, bits: int) -> QuantizedInput:
    return quantized_input(x, bits, **PARTS)


def exact(x: Tensor) -> Tensor:
    blocks = (x.double() / PARTS["channel_scale"].double()).unflatten(-1, (3, 8))
    rotated: Tensor = (blocks @ PARTS["rotation"].double()).flatten(-2)
    return rotated


def test_bits_16_only_transform() -> None:
    values, scale = transformed(X.bfloat16(), 16)
    assert scale is None
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact(X.bfloat16()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_are_those_of_the_transformed_and_clipped_input(bits: int) -> None:
    values, scale = transformed(X, bits)
    codes, expected = quantize(exact(X).float(), bits, -1, PARTS["activation_clip"])
    assert scale is not None
    torch.testing.assert_close(scale, expected, rtol=1e-5, atol=0)
    assert (values.int() - codes.int()).abs().max() <= 1  # a tie may fall to the other side
    assert (values != codes).float().mean() < 0.02


def test_more_bits_are_unclipped_and_fewer_change_nothing() -> None:
    plain = transformed(X, 6)
    with least_activation_bits(8):
        assert current_activation_bits(6) == 8
        raised = transformed(X, 6)
        with least_activation_bits(4):
            assert torch.equal(transformed(X, 6).values, plain.values)
        assert torch.equal(transformed(X, 6).values, raised.values)
    unclipped = quantized_input(X, 8, **{**PARTS, "activation_clip": torch.ones(1)})
    assert torch.equal(raised.values, unclipped.values)
    assert torch.equal(transformed(X, 6).values, plain.values)


def test_another_thread_has_bits_of_its_own() -> None:
    seen: list[int] = []
    with least_activation_bits(16):
        thread = threading.Thread(target=lambda: seen.append(current_activation_bits(6)))
        thread.start()
        thread.join()
    assert seen == [6]
