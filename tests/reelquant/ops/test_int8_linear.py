"""The INT8 linear layer against float64, against `QuantizedLinear`, and its kernel against both."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from reelquant.ops.int8_linear import op
from reelquant.ops.int8_linear.int_mm import integer_product_int_mm
from reelquant.ops.int8_linear.op import int8_linear
from reelquant.ops.int8_linear.reference import int8_linear_reference, integer_product
from reelquant.quantization.input_transform import quantized_input
from reelquant.quantization.layer_spec import LayerSpec
from reelquant.quantization.linear import QuantizedLinear
from reelquant.quantization.packing import pack_bits
from reelquant.quantization.quantizer import quantize
from reelquant.quantization.weight_grid import fit_two_level
from tests.errors import raises

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
EPILOGUES = ["plain", "no bias", "gelu", "residual", "gated residual", "gated, in place"]


class Inputs(NamedTuple):
    codes: Tensor
    token_scale: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    gate: Tensor
    residual: Tensor

    def to(self, device: str) -> Inputs:
        return Inputs(*(x.to(device) for x in self))


def drawn(num_tokens: int, d: int, n: int, *, seed: int = 0) -> Inputs:
    """Gaussian activations with loud channels at 8 bits, Gaussian weights at 4 bits in two levels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, d, generator=generator)
    x[:, :: max(1, d // 24)] *= 12
    codes, token_scale = quantize(x, 8, -1)
    weight = torch.randn(n, d, generator=generator) / d**0.5
    grid = fit_two_level(weight, 4)
    bias, gate = (torch.randn(n, generator=generator) for _ in range(2))
    residual = 3 * torch.randn(num_tokens, n, generator=generator)
    return Inputs(
        codes, token_scale[:, 0], grid.expand(grid.round(weight)), grid.scale[:, 0], bias.bfloat16(), gate, residual
    )


def arguments(inputs: Inputs, epilogue: str, residual: Tensor) -> dict[str, Tensor | str | None]:
    return {
        "bias": None if epilogue == "no bias" else inputs.bias,
        "activation": "gelu_tanh" if epilogue == "gelu" else None,
        "gate": inputs.gate if "gated" in epilogue else None,
        "residual": residual if "residual" in epilogue or "in place" in epilogue else None,
    }


def in_float64(inputs: Inputs, epilogue: str, residual: Tensor) -> Tensor:
    y = inputs.codes.double() * inputs.token_scale.double()[:, None]
    y = y @ (inputs.weight.double() * inputs.weight_scale.double()[:, None]).T
    y = y if epilogue == "no bias" else y + inputs.bias.double()
    if epilogue == "gelu":
        return gelu(y, approximate="tanh")
    if "gated" in epilogue:
        y = y * inputs.gate.double()
    return y if epilogue in ("plain", "no bias") else y + residual.double()


def check_epilogue(inputs: Inputs, epilogue: str, dtype: torch.dtype, run: Callable[..., Tensor]) -> None:
    """Output and residual are views: columns of a wider buffer, rows of a joint one; nothing else may be written."""
    (num_tokens, _), n = inputs.codes.shape, len(inputs.weight)
    joint = torch.full((num_tokens + 5, 2 * n), float("nan"), dtype=dtype, device=inputs.codes.device)
    out = joint[3 : 3 + num_tokens, n:]
    residual = torch.empty(num_tokens, n + 16, dtype=dtype, device=out.device)[:, :n]
    residual.copy_(inputs.residual)
    expected = in_float64(inputs, epilogue, residual)
    if epilogue == "gated, in place":
        out.copy_(residual)
        residual = out
    call = arguments(inputs, epilogue, residual)
    result = run(*inputs[:4], call.pop("bias"), **call, out=out)
    assert result.data_ptr() == out.data_ptr()
    error = float((out.double() - expected).norm() / expected.norm())
    assert error < TOLERANCE[dtype], (epilogue, dtype, error)
    outside = torch.ones_like(joint, dtype=torch.bool)
    outside[3 : 3 + num_tokens, n:] = False
    assert bool(joint[outside].isnan().all())


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_reference_is_the_formula(epilogue: str, dtype: torch.dtype) -> None:
    for seed, (num_tokens, d, n) in enumerate([(1, 16, 16), (37, 40, 19), (131, 3072, 80)]):
        inputs = drawn(num_tokens, d, n, seed=seed)
        check_epilogue(inputs, epilogue, dtype, int8_linear)  # measured: 1e-7, 2e-4 and 1.7e-3
        check_epilogue(inputs, epilogue, dtype, int8_linear_reference)


def test_the_sum_is_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    codes, weight = (torch.randint(-128, 128, (m, 15_360), generator=generator).to(torch.int8) for m in (5, 7))
    codes[0], weight[0], codes[1], weight[1] = -128, -128, 127, -127
    assert torch.equal(integer_product(codes, weight).long(), codes.long() @ weight.long().T)


@pytest.mark.parametrize(
    ("num_tokens", "d", "n"), [(1, 1, 1), (16, 40, 19), (17, 16, 24), (33, 63, 65), (300, 3072, 80), (5, 15_360, 7)]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_product_of_torch_is_the_reference(num_tokens: int, d: int, n: int, device: str) -> None:
    generator = torch.Generator().manual_seed(d)
    codes = torch.randint(-128, 128, (num_tokens, d + 3), generator=generator).to(device, torch.int8)[:, 1 : d + 1]
    weight = torch.randint(-128, 128, (n, d), generator=generator).to(device, torch.int8)
    found = integer_product_int_mm(codes, weight)
    assert found.dtype == torch.int32
    assert torch.equal(found, integer_product(codes, weight))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_epilogue_on_the_product_of_torch_gives_the_same_bits(
    epilogue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = drawn(4099, 40, 19, seed=5)
    call = arguments(inputs, epilogue, inputs.residual)
    bias = call.pop("bias")
    expected = int8_linear(*inputs[:4], bias, **call, implementation="reference")  # type: ignore[arg-type]
    monkeypatch.setattr(op, "takes_int_mm", lambda _implementation, _device: True)
    check_epilogue(inputs, epilogue, torch.float32, int8_linear)
    assert torch.equal(int8_linear(*inputs[:4], bias, **call), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["rows", "columns", "another dtype"])
def test_residual_and_out_may_not_meet_elsewhere_than_in_place(kind: str) -> None:
    inputs = drawn(6, 32, 16)
    joint = torch.zeros(7, 40)
    out = joint[:6, :16]
    residual = {
        "rows": joint[1:, :16],
        "columns": joint[:6, 8:24],
        "another dtype": joint.view(torch.bfloat16)[:6, :16],
    }
    with raises(ValueError, "residual", "out"):
        int8_linear(*inputs[:4], residual=residual[kind], out=out)
    for allowed in (joint[:6, 16:32], out, torch.zeros(6, 16)):
        int8_linear(*inputs[:4], residual=allowed, out=out)
    one = drawn(1, 32, 16)
    int8_linear(*one[:4], residual=joint[:1, :16].as_strided((1, 16), (3, 1)), out=joint[:1, :16])


def test_is_what_a_quantized_linear_computes() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(48, 192, generator=generator)
    grid = fit_two_level(weight, 4)
    spec = LayerSpec(4, 8, "two_level", "layer", channel_scale=False, rotation=0, digest="0" * 16)
    layer = QuantizedLinear(192, 48, spec, name="layer", bias=True, dtype=torch.float32)
    layer.load_state_dict(
        {
            "weight_packed": pack_bits(grid.round(weight), 4),
            "weight_scale": grid.scale[:, 0],
            "group_scale": grid.group_scale,
            "activation_clip": torch.tensor([0.9]),
            "bias": torch.randn(48, generator=generator),
        }
    )
    x = torch.randn(33, 192, generator=generator)
    values, scale = quantized_input(x, 8, channel_scale=None, rotation=None, activation_clip=layer.activation_clip)
    assert scale is not None
    out = int8_linear(
        values, scale[:, 0], layer.integer_weight(), layer.weight_scale, layer.bias, out_dtype=torch.float32
    )
    torch.testing.assert_close(out, layer(x), rtol=1e-6, atol=1e-6)


def test_errors() -> None:
    codes, token_scale, weight, weight_scale, bias, gate, residual = drawn(6, 32, 16)
    four = (codes, token_scale, weight, weight_scale)
    with raises(ValueError, "codes", "weight", (6, 32), (16, 31)):
        int8_linear(codes, token_scale, weight[:, :31], weight_scale)
    with raises(ValueError, "codes", torch.int32, "token_scale", [6], [5]):
        int8_linear(codes.int(), token_scale[:5], weight, weight_scale)
    with raises(ValueError, "codes", (1, 6)):
        int8_linear(codes.T.contiguous().T, token_scale, weight, weight_scale)
    with raises(ValueError, "out", [6, 16], torch.float64):
        int8_linear(*four, out=torch.empty(6, 16, dtype=torch.float64))
    with raises(ValueError, "activation", "relu", "gelu_tanh"):
        int8_linear(*four, activation="relu")  # type: ignore[arg-type]
    with raises(ValueError, "gate", "residual is None"):
        int8_linear(*four, gate=gate)
    with raises(ValueError, "gate", "activation", "gelu_tanh"):
        int8_linear(*four, bias, gate=gate, residual=residual, activation="gelu_tanh")
    with raises(ValueError, "triton", "cpu"):
        int8_linear(*four, implementation="triton")
    with raises(ValueError, "implementation", "cuda", "triton"):
        int8_linear(*four, implementation="cuda")  # type: ignore[arg-type]


def test_the_kernel_interpreted(interpreted: Callable[[str, str], None]) -> None:
    interpreted(__file__, "interpreted_kernel")


def interpreted_kernel() -> None:
    from functools import partial

    from reelquant.ops.int8_linear.launch import LARGE, Config, launch_int8_linear

    small = [
        Config(16, 32, 32, num_warps=4, num_stages=1, group=2),
        Config(32, 64, 32, num_warps=4, num_stages=1, group=2, split=2),
        Config(32, 64, 32, num_warps=4, num_stages=1, group=3, split=4, persistent=False),
    ]
    for config, (num_tokens, d, n) in zip(small, [(33, 32, 48), (37, 48, 80), (65, 96, 144)], strict=True):
        inputs = drawn(num_tokens, d, n, seed=d)
        for epilogue in EPILOGUES:
            # The interpreter cuts bits off where the hardware rounds to bf16.
            for dtype in (torch.float32, torch.float16):
                check_epilogue(inputs, epilogue, dtype, partial(launch_int8_linear, config=config))
    check_epilogue(drawn(130, 144, 272), "gated residual", torch.float32, partial(launch_int8_linear, config=LARGE))
    check_epilogue(drawn(1, 272, 80), "gelu", torch.float32, launch_int8_linear)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "d", "n"),
    [(1, 16, 16), (60, 3072, 9216), (257, 3072, 3072), (1000, 15_360, 3072), (4099, 3072, 1040), (57_857, 272, 528)],
)
def test_the_kernel(num_tokens: int, d: int, n: int) -> None:
    def run(*tensors: Tensor | None, **others: Tensor | str | None) -> Tensor:
        return int8_linear(*tensors, **others, implementation="triton")  # type: ignore[arg-type]

    for seed in range(2):
        inputs = drawn(num_tokens, d, n, seed=seed).to("cuda")
        for dtype in TOLERANCE if seed == 0 else [torch.bfloat16]:
            for epilogue in EPILOGUES:
                check_epilogue(inputs, epilogue, dtype, run)


@pytest.mark.gpu
def test_the_kernel_gives_the_same_every_time() -> None:
    inputs = drawn(1025, 3072, 3072).to("cuda")
    first, second = (int8_linear(*inputs[:4], inputs.bias, activation="gelu_tanh") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["SMALL", "MEDIUM", "LARGE"])
def test_every_configuration_of_the_kernel(name: str) -> None:
    from functools import partial

    from reelquant.ops.int8_linear import launch

    run = partial(launch.launch_int8_linear, config=getattr(launch, name))
    # Tiles that reach over every edge, also wholly; one step over d, two with a short second, many.
    for shape in [(130, 16, 64), (200, 144, 272), (5001, 3072, 1552), (2048, 512, 1024)]:
        inputs = drawn(*shape, seed=3).to("cuda")
        for epilogue in EPILOGUES:
            for dtype in TOLERANCE:
                check_epilogue(inputs, epilogue, dtype, run)


@pytest.mark.gpu
def test_the_kernel_on_what_it_does_not_take() -> None:
    inputs = drawn(33, 40, 24).to("cuda")
    with raises(ValueError, "codes", 40, 16):
        int8_linear(*inputs[:4], implementation="triton")
    check_epilogue(inputs, "gated residual", torch.float32, int8_linear)
