"""The closed form of the repair, and blocks whose drift it takes away."""

import copy

import pytest
import torch
from torch import Tensor, nn

from reelquant.calibration.block_call import joined
from reelquant.calibration.drift_repair import (
    LARGEST_GAIN,
    RepairMoments,
    RepairSample,
    held_back,
    relative_error,
    repair_block,
)
from reelquant.calibration.sample import Sample
from reelquant.checkpoint.layer_packing import pack_layer
from reelquant.quantization.linear import QuantizedLinear, replace_linear_layers
from reelquant.quantization.weight_grid import fit_per_channel
from tests.errors import raises
from tests.reelquant.narrow_blocks import BLOCKS, calls_of, config_of, constants_of, layout_of, new_block, streams_of

CONFIG = config_of()
CALLS = calls_of(CONFIG)
LAYOUT = layout_of(CONFIG, (4, 2, 8, 10), 5)


def one_layer(num: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`(product [N, n], gate [n], error [N, n], weights [N])` of a few samples with other numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(7 + index, 5, generator=generator) + 0.3,
            torch.randn(5, generator=generator),
            torch.randn(7 + index, 5, generator=generator),
            torch.rand(7 + index, generator=generator) + 0.1,
        )
        for index in range(num)
    ]


def solved(
    samples: list[tuple[Tensor, Tensor, Tensor, Tensor]], damping: float, **options: bool
) -> tuple[Tensor, Tensor]:
    moments = RepairMoments()
    for sample in samples:
        moments.add(*sample)
    return moments.solve(damping, **options)


@pytest.mark.parametrize("damping", [0.0, 0.05, 3.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_closed_form_is_that_of_lstsq(damping: float, with_bias: bool) -> None:
    samples = one_layer()
    gain, change = solved(samples, damping, with_bias=with_bias)
    roots = torch.cat([weights for *_, weights in samples]).double().sqrt()[:, None]
    columns = (
        torch.cat([gate * torch.stack([p, torch.ones_like(p)]) for p, gate, *_ in samples], dim=1).double() * roots
    )
    error = torch.cat([error for _, _, error, _ in samples]).double() * roots
    ridges = damping * columns.square().sum(dim=1).mean(dim=1)
    for channel in range(5):
        rows = torch.cat([columns[:, :, channel].T, ridges.sqrt().diag()])[:, : 1 + with_bias]
        wanted = torch.cat([error[:, channel], torch.zeros(2, dtype=torch.float64)])
        exact = torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0]
        assert float(gain[channel] - 1) == pytest.approx(float(exact[0]), rel=1e-5, abs=1e-7)
        assert float(change[channel]) == pytest.approx(float(exact[1]) if with_bias else 0.0, rel=1e-5, abs=1e-7)


def test_known_gain_and_bias_are_found_under_any_gate() -> None:
    wanted, shift = torch.tensor([0.8, 1.0, 1.3, 1.05, 0.9]), torch.tensor([0.5, -0.2, 0.0, 1.0, -2.0])
    samples = [(p, gate, gate * ((wanted - 1) * p + shift), w) for p, gate, _, w in one_layer(4)]
    gain, change = solved(samples, 1e-9)
    assert torch.allclose(gain.float(), wanted, atol=1e-5)
    assert torch.allclose(change.float(), shift, atol=1e-5)


def test_channels_that_are_not_excited_stay_and_gains_are_bounded() -> None:
    samples = one_layer()
    for product, gate, error, _ in samples:
        product[:, 0] *= 1e-6
        gate[1] = 0.0
        error[:, 2] = 40 * product[:, 2] * gate[2]
    gain, _ = solved(samples, 0.01)
    assert float(gain[0]) == pytest.approx(1.0, abs=1e-4)
    assert float(gain[1]) == 1.0
    assert float(gain[2]) == LARGEST_GAIN


def test_what_is_saved_is_the_difference_of_the_errors() -> None:
    moments, saved = RepairMoments(), 0.0
    gain, change = 1 + 0.1 * torch.randn(5, dtype=torch.float64), 0.2 * torch.randn(5, dtype=torch.float64)
    for product, gate, error, weights in one_layer():
        moments.add(product, gate, error, weights)
        left = error - gate * ((gain - 1) * product + change)
        saved += float((weights[:, None] * (error.square() - left.square())).sum())
    assert moments.saved(gain, change) == pytest.approx(saved, rel=1e-5)
    fitted = moments.solve(0.0)
    assert moments.saved(*fitted) > abs(saved)


@pytest.mark.parametrize(("num", "fitted", "judges"), [(1, 1, 1), (3, 3, 3), (4, 3, 1), (9, 7, 2), (12, 9, 3)])
def test_every_fourth_sample_is_held_back(num: int, fitted: int, judges: int) -> None:
    kept, held = held_back(list(range(num)))
    assert (len(kept), len(held)) == (fitted, judges)
    if num >= 4:
        assert sorted([*kept, *held]) == list(range(num))
        assert held == list(range(3, num, 4))


def make_samples(num: int, drift: float) -> list[RepairSample]:
    """Streams, and quantized ones that are off by a factor and an offset per channel."""
    generator = torch.Generator().manual_seed(1)
    factor, offset = (1 + drift * torch.randn(32, generator=generator)), drift * torch.randn(32, generator=generator)
    samples = []
    for _ in range(num):
        stream = torch.randn(LAYOUT.num_tokens, 32, generator=generator)
        # Embeddings that have much in common, as those of one schedule do: so have the gates.
        temb = torch.linspace(-2, 2, 32) + 0.3 * torch.randn(1, 32, generator=generator)
        exact, drifted = (streams_of(tokens, LAYOUT) for tokens in (stream, stream * factor + offset))
        samples.append(RepairSample(Sample(exact, drifted, constants_of(CONFIG, LAYOUT, temb))))
    return samples


def quantized_copy(block: nn.Module, bits: int = 4) -> nn.Module:
    """Every linear rounded to `bits`, activations as they are."""
    copied, tensors, specs = copy.deepcopy(block), {}, {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            grid = fit_per_channel(module.weight.detach(), bits)
            codes = grid.round(module.weight.detach())
            packed, specs[name] = pack_layer(name, codes=codes, grid=grid, bias=None, activation_bits=16)
            tensors.update(packed)
    replace_linear_layers(copied, specs)
    copied.load_state_dict({**block.state_dict(), **tensors}, strict=False, assign=True)
    return copied.requires_grad_(False)


def make_block(name: str) -> nn.Module:
    torch.manual_seed(2)
    return new_block(CONFIG, name).requires_grad_(False)


@pytest.mark.parametrize("name", BLOCKS)
def test_output_layers_add_up_to_the_block(name: str) -> None:
    from reelquant.calibration.drift_repair import _after_level

    block, sample = make_block(name), make_samples(1, 0.0)[0].stream
    call = CALLS[name]
    levels = call.outputs
    after = _after_level(call, block, sample.reference, sample.constants, level=len(levels) - 1)
    out = call(block, sample.reference, sample.constants)
    assert relative_error([(streams_of(after.stream, LAYOUT), out)]) < 1e-12
    quantizable = {layer for level in call.levels for group in level for layer in group.layers}
    assert {output.layer for level in levels for output in level} <= quantizable


@pytest.mark.parametrize("name", BLOCKS)
def test_repair_takes_drift_away_and_advances_both_streams(name: str) -> None:
    reference, samples = make_block(name), make_samples(8, 0.2)
    quantized, untouched = quantized_copy(reference), quantized_copy(reference)
    entries = [sample.stream for sample in make_samples(8, 0.2)]
    repair = repair_block(CALLS[name], (reference, quantized), samples)
    assert repair.accepted
    assert repair.without == repair.before
    assert repair.after < 0.85 * repair.before, (repair.before, repair.after)
    judged = []
    for entry, sample in zip(entries, samples, strict=True):
        exact = CALLS[name](reference, entry.reference, entry.constants)
        found = CALLS[name](quantized, entry.quantized, entry.constants)
        assert torch.equal(joined(sample.stream.reference), joined(exact))
        assert torch.equal(joined(sample.stream.quantized), joined(found))
        judged.append((found, exact))
    assert relative_error(judged[3::4]) == pytest.approx(repair.after)
    fitted = [pair for index, pair in enumerate(judged) if index % 4 != 3]
    unrepaired = [
        (CALLS[name](untouched, entry.quantized, entry.constants), exact)
        for entry, (_, exact) in zip(entries, judged, strict=True)
    ]
    assert relative_error(fitted) < relative_error(unrepaired)
    for layer, tensors in repair.layers.items():
        module = quantized.get_submodule(layer)
        assert isinstance(module, QuantizedLinear)
        assert torch.equal(module.weight_scale, tensors["weight_scale"])
        assert bool((tensors["weight_scale"] > 0).all())
    outputs = {output.layer for level in CALLS[name].outputs for output in level}
    assert set(repair.layers) <= outputs


@pytest.mark.parametrize("name", BLOCKS)
def test_repair_that_does_not_help_is_taken_back(name: str) -> None:
    """The held-back sample drifts the other way: what helps the others harms it."""
    reference = make_block(name)
    quantized = quantized_copy(reference, bits=8)
    samples = make_samples(4, 0.3)
    held = samples[3].stream
    held.quantized = {key: 2 * held.reference[key] - stream for key, stream in held.quantized.items()}
    before = {key: value.clone() for key, value in quantized.state_dict().items()}
    repair = repair_block(CALLS[name], (reference, quantized), samples)
    assert not repair.accepted
    assert repair.after >= repair.before
    assert all(torch.equal(value, before[key]) for key, value in quantized.state_dict().items())


def test_layers_that_are_not_quantized_are_left_alone() -> None:
    name = BLOCKS[0]
    reference = make_block(name)
    quantized = quantized_copy(reference)
    quantized.set_submodule("ff.net.2", copy.deepcopy(reference.get_submodule("ff.net.2")))
    repair = repair_block(CALLS[name], (reference, quantized), make_samples(5, 0.2))
    assert repair.layers
    assert set(repair.layers) <= {"attn.to_out.0", "attn.to_add_out", "ff_context.net.2"}
    plain = make_samples(5, 0.2)
    nothing = repair_block(CALLS[name], (reference, copy.deepcopy(reference)), plain)
    assert (nothing.accepted, nothing.before) == (False, nothing.after)


def test_biases_are_rounded_to_the_dtype_in_which_they_are_stored() -> None:
    reference = make_block(BLOCKS[1])
    quantized = quantized_copy(reference)
    repair = repair_block(CALLS[BLOCKS[1]], (reference, quantized), make_samples(4, 0.2), bias_dtype=torch.bfloat16)
    bias = repair.layers["proj_out"]["bias"]
    assert torch.equal(bias, bias.bfloat16().float())
    assert bias.dtype == torch.float32


def test_moments_without_samples_are_our_own_error() -> None:
    with raises(AssertionError, "sample"):
        RepairMoments().solve()
