import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reelquant.checkpoint.layer_packing import pack_layer
from reelquant.quantization.input_transform import QuantizedInput, quantized_input
from reelquant.quantization.layer_spec import LayerSpec
from reelquant.quantization.linear import QuantizedLinear, replace_linear_layers, share_group_tensors
from reelquant.quantization.rotation import block_size, hadamard, transform_weight
from reelquant.quantization.weight_grid import fit_per_channel, fit_two_level
from tests.errors import raises

LAYOUTS = {"per_channel": fit_per_channel, "two_level": fit_two_level}


def quantized(
    linear: nn.Linear,
    layout: str,
    *,
    weight_bits: int = 4,
    activation_bits: int = 6,
    transform: bool = True,
    clip: float = 0.8,
) -> tuple[QuantizedLinear, Tensor]:
    """The quantized layer, and in float64 the weight on its grid in transformed coordinates."""
    d = linear.in_features
    scale = torch.rand(d) + 0.5 if transform else None
    rotation = (hadamard(block_size(d)) + 0.02 * torch.randn(block_size(d), block_size(d))) if transform else None
    rotation = None if rotation is None else rotation.bfloat16()
    weight = transform_weight(linear.weight.detach(), scale, rotation)
    grid = LAYOUTS[layout](weight, weight_bits)
    codes = grid.round(weight)
    bias = None if linear.bias is None else linear.bias.detach()
    tensors, spec = pack_layer(
        "layer",
        codes=codes,
        grid=grid,
        bias=bias,
        activation_bits=activation_bits,
        channel_scale=scale,
        rotation=rotation,
        activation_clip=torch.tensor([clip]) if activation_bits < 16 else None,
    )
    layer = QuantizedLinear(d, linear.out_features, spec, name="layer", bias=bias is not None)
    layer.load_state_dict({name.removeprefix("layer."): tensor for name, tensor in tensors.items()})
    return layer, codes.double() * grid.column_scale(d).double()


def transformed(layer: QuantizedLinear, x: Tensor) -> QuantizedInput:
    return quantized_input(
        x,
        layer.spec.activation_bits,
        channel_scale=layer.channel_scale,
        rotation=layer.rotation,
        activation_clip=layer.activation_clip,
    )


def reference(layer: QuantizedLinear, weight: Tensor, x: Tensor) -> Tensor:
    """The layer's output in float64 from dequantized numbers; `weight [n, d]` in transformed coordinates."""
    codes, x = transformed(layer, x).values.double(), x.double()
    if layer.channel_scale is not None:
        x = x / layer.channel_scale.double()
    if layer.rotation is not None:
        x = x @ torch.block_diag(*[layer.rotation.double()] * (x.shape[-1] // layer.spec.rotation))
    if layer.activation_clip is not None:
        largest = 2 ** (layer.spec.activation_bits - 1) - 1
        # From the layer's codes: one code more or less at a tie is no error of the arithmetic that is tested here.
        scale = x.abs().amax(-1, keepdim=True) * layer.activation_clip.double() / largest
        exact = (x / scale).clamp(-largest, largest)
        assert (codes - exact).abs().max() <= 0.5 + 1e-3
        x = codes * scale
    y = x @ weight.T
    return y if layer.bias is None else y + layer.bias.double()


def relative_error(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("activation_bits", [4, 6, 8, 16])
@pytest.mark.parametrize(("d", "n", "bias"), [(24, 7, True), (200, 33, False), (96, 1, True), (13, 5, True)])
def test_forward_is_that_of_dequantized_float64(
    layout: str, transform: bool, activation_bits: int, d: int, n: int, bias: bool
) -> None:
    linear = nn.Linear(d, n, bias=bias)
    layer, weight = quantized(linear, layout, activation_bits=activation_bits, transform=transform)
    x = torch.randn(3, 5, d) * torch.logspace(-2, 2, d)
    out = layer(x)
    assert out.shape == (3, 5, n)
    assert out.dtype == torch.float32
    error = relative_error(out, reference(layer, weight, x))
    assert error < 1e-6, error  # measured: at most 2.3e-7


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_width_of_codes(bits: int, layout: str) -> None:
    linear = nn.Linear(72, 9)
    layer, weight = quantized(linear, layout, weight_bits=bits)
    x = torch.randn(11, 72)
    assert relative_error(layer(x), reference(layer, weight, x)) < 1e-6
    assert layer.integer_weight().dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_the_last_rounding(dtype: torch.dtype) -> None:
    layer, weight = quantized(nn.Linear(64, 32), "two_level")
    x = torch.randn(17, 64).to(dtype)
    expected = reference(layer, weight, x)
    out = layer(x)
    assert out.dtype == dtype
    assert torch.equal(out, layer(x.float()).to(dtype))
    assert relative_error(out, expected) < torch.finfo(dtype).eps / 2


def test_quantized_layer_stays_close_to_the_linear_one() -> None:
    linear = nn.Linear(192, 96)
    x = torch.randn(50, 192)
    for bits, tolerance in ((8, 0.013), (4, 0.14)):  # measured: 0.0114 and 0.129
        layer, _ = quantized(linear, "two_level", weight_bits=bits, activation_bits=8, clip=1.0)
        assert relative_error(layer(x), linear(x).detach().double()) < tolerance


@pytest.mark.parametrize("transform", [True, False])
def test_dequantized_weight_acts_on_the_untransformed_input(transform: bool) -> None:
    layer, _ = quantized(nn.Linear(40, 12), "per_channel", activation_bits=16, transform=transform)
    x = torch.randn(9, 40)
    expected = nn.functional.linear(x, layer.dequantized_weight(), layer.bias)
    assert relative_error(layer(x), expected.double()) < 1e-6


def test_zero_tokens_and_zero_input() -> None:
    layer, _ = quantized(nn.Linear(24, 7), "two_level")
    assert layer(torch.empty(2, 0, 24)).shape == (2, 0, 7)
    assert layer.bias is not None
    torch.testing.assert_close(layer(torch.zeros(2, 24)), layer.bias.expand(2, -1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_change_of_dtype_keeps_what_the_format_prescribes(dtype: torch.dtype) -> None:
    layer, _ = quantized(nn.Linear(24, 7), "two_level")
    before = copy.deepcopy(layer.state_dict())
    nn.Sequential(layer).to(dtype)
    after = layer.state_dict()
    assert after.pop("bias").dtype == dtype
    assert set(after) == {
        "weight_packed", "weight_scale", "group_scale", "channel_scale", "rotation", "activation_clip"
    }  # fmt: skip
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name


def test_moves_to_the_meta_device_and_back_to_empty() -> None:
    layer, _ = quantized(nn.Linear(24, 7), "two_level")
    layer.to(device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer.to_empty(device="cpu")
    assert layer.weight_scale.dtype == torch.float32
    assert not any(tensor.is_meta for tensor in layer.state_dict().values())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("activation_bits", [6, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_computes_what_the_cpu_does(layout: str, activation_bits: int, dtype: torch.dtype) -> None:
    # CUDA divides by a number by multiplying with its reciprocal: a scale may be one unit in the last place off, and a code
    # that lies on the border between two integers may come out as its neighbour.
    layer, _ = quantized(nn.Linear(200, 33), layout, activation_bits=activation_bits, transform=False)
    x = torch.randn(3, 17, 200).to(dtype)
    codes, expected = transformed(layer, x), layer(x)
    layer.cuda()
    apart = (transformed(layer, x.cuda()).values.cpu().float() - codes.values.float()).abs()
    assert float(apart.max()) <= 1
    assert int((apart > 1e-5).sum()) <= 1e-3 * apart.numel()
    out = layer(x.cuda()).cpu()
    assert out.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float32 else 2e-3
    assert relative_error(out, expected.double()) < tolerance


class Attention(nn.Module):
    """Three layers of one group."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(24, 24), nn.Linear(24, 8, bias=False)
        self.net = nn.ModuleList([nn.Linear(24, 12), nn.ReLU()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.to_q(x), self.to_k(x), self.net[0](x)


def group_spec(**changes: object) -> LayerSpec:
    spec = LayerSpec(
        weight_bits=4,
        activation_bits=6,
        weight_layout="two_level",
        group="to_q",
        channel_scale=True,
        rotation=8,
        digest="",
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


@pytest.fixture
def attention() -> Attention:
    model = Attention()
    layers = replace_linear_layers(model, dict.fromkeys(("to_q", "to_k", "net.0"), group_spec()))
    for layer in layers.values():
        for name, tensor in layer.state_dict().items():
            random = torch.rand(tensor.shape) + 0.5
            layer.get_buffer(name).copy_(random * 5) if name != "bias" else layer.bias.copy_(random)  # type: ignore[union-attr]
    share_group_tensors(model)
    return model


def test_layers_of_a_group_depend_on_nothing_but_themselves(attention: Attention) -> None:
    x = torch.randn(6, 24)
    expected = [layer(x) for layer in (attention.to_q, attention.to_k, attention.get_submodule("net.0"))]
    for suffix in ("channel_scale", "rotation", "activation_clip"):
        attention.to_q.get_buffer(suffix).data = torch.full((0,), float("nan"))
    assert torch.equal(attention.to_k(x), expected[1])
    assert torch.equal(attention.get_submodule("net.0")(x), expected[2])
    with torch.inference_mode():
        assert torch.equal(attention.to_k(x.clone()), expected[1])


def test_a_state_dict_fills_the_whole_group(attention: Attention) -> None:
    x, other = torch.randn(6, 24), Attention()
    replace_linear_layers(other, dict.fromkeys(("to_q", "to_k", "net.0"), group_spec()))
    other.load_state_dict(attention.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other(x), attention(x), strict=True))
    other.load_state_dict({name: tensor.clone() for name, tensor in attention.state_dict().items()}, assign=True)
    assert all(torch.equal(a, b) for a, b in zip(other(x), attention(x), strict=True))


def test_only_the_leader_stores_the_groups_tensors(attention: Attention) -> None:
    shared = {name for name in attention.state_dict() if name.endswith(("channel_scale", "rotation", "clip"))}
    assert shared == {"to_q.channel_scale", "to_q.rotation", "to_q.activation_clip"}
    assert len(list(attention.modules())) == 6


def test_copies_share_nothing(attention: Attention) -> None:
    x = torch.randn(6, 24)
    expected = attention(x)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):  # noqa: S301
        assert all(torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))
        other.get_buffer("to_k.channel_scale").mul_(torch.rand(24) + 0.1)
        assert not torch.equal(other.to_k(x), expected[1])
        assert torch.equal(attention.to_k(x), expected[1])


def test_forward_gives_no_gradient_but_works_with_autograd_on(attention: Attention) -> None:
    x = torch.randn(6, 24, requires_grad=True)
    out = attention.to_k(x)
    assert not out.requires_grad
    assert torch.equal(out, attention.to_k(x.detach()))


def test_names_every_layer_that_cannot_be_replaced() -> None:
    model = Attention()
    specs = {
        "to_q": group_spec(),
        "to_k": group_spec(activation_bits=8),
        "to_v": group_spec(),
        "net.1": group_spec(group="net.1"),
        "net.0": group_spec(group="net.0", rotation=16),
        "other": group_spec(group="nobody"),
    }
    wrong = ("to_v", "net.1", "ReLU", "net.0", 16, 24, "to_k", "'to_q'", "activation_bits", "other", "nobody")
    with raises(ValueError, "Attention", *wrong):
        replace_linear_layers(model, specs)
    assert all(not isinstance(module, QuantizedLinear) for module in model.modules())


def test_a_member_without_its_groups_tensors_says_so() -> None:
    layer = QuantizedLinear(24, 8, group_spec(), name="to_k", bias=False)
    with raises(ValueError, "to_k", "to_q", "share_group_tensors"):
        layer(torch.randn(2, 24))
    with raises(ValueError, "to_q", 8, 12):
        QuantizedLinear(12, 8, group_spec(), name="to_q", bias=False)
