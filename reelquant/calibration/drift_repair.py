"""Drift repair (method §9.2): a sequential pass over the blocks that brings the quantized stream back to full precision's.

Segments are calibrated side by side, each from full-precision inputs, so nobody has seen the error that all blocks before
leave in the stream at run time. Every block ends in layers that add `gate * (gain * W h + bias)` to the stream; gain and
bias per output channel are fitted so that the stream right after the addition, on the drifted input, comes nearest to the
full-precision stream at the same place. The gain goes into the weight's scale: neither costs anything at run time.

Tokens count relative to their own size, as the normalization in front of the next layers sees them: otherwise a few tokens
of huge activations would decide everything. A layer is changed only if that lowers the error on samples that were held back
from the fit, a block only if all its changes together do.

Shapes: N tokens of one sample, n output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.calibration.block_call import BlockCall, Constants, Streams, by_token, joined
from reelquant.calibration.host_memory import moved_all
from reelquant.calibration.sample import Sample
from reelquant.families.family import OutputLayer
from reelquant.quantization.input_transform import least_activation_bits
from reelquant.quantization.linear import QuantizedLinear

DAMPING = 1.0
"""Ridge, relative to the mean over the channels of what is divided by: weakly excited channels hardly change. Weaker ridges
fit the drift of the samples at hand: few samples, each with one gate for all its tokens."""
LARGEST_GAIN = 2.0
"""Gains stay within this factor of one: scales must be positive, and larger changes are no drift."""
_HOLD_BACK_EVERY = 4
_TINY = 1e-30


class RepairMoments:
    """Sums over all tokens of all samples, from which gain and bias of one layer follow; float64 `[n]` each."""

    def __init__(self) -> None:
        self.product_product: Tensor | float = 0.0
        self.product_gate: Tensor | float = 0.0
        self.gate_gate: Tensor | float = 0.0
        self.product_error: Tensor | float = 0.0
        self.gate_error: Tensor | float = 0.0

    def add(self, product: Tensor, gate: Tensor, error: Tensor, weights: Tensor) -> None:
        """Adds one sample.

        Args:
            product: `[N, n]`, the layer's output without its bias.
            gate: `[n]`, what multiplies the output before it is added to the stream.
            error: `[N, n]`, the full-precision stream less the quantized one, right after the addition.
            weights: `[N]`, of the tokens.
        """
        product, error, gate = product.float(), error.float(), gate.double()
        weights = weights.float()[:, None]
        weighted, wanted = weights * product, weights * error
        self.product_product += gate.square() * (weighted * product).sum(dim=0, dtype=torch.float64)
        self.product_gate += gate.square() * weighted.sum(dim=0, dtype=torch.float64)
        self.gate_gate += gate.square() * weights.sum(dtype=torch.float64)
        self.product_error += gate * (weighted * error).sum(dim=0, dtype=torch.float64)
        self.gate_error += gate * wanted.sum(dim=0, dtype=torch.float64)

    def solve(self, damping: float = DAMPING, *, with_bias: bool = True) -> tuple[Tensor, Tensor]:
        """`gain [n]` and the change of the bias `[n]`, float64, that minimize

        sum weight ||error - gate ((gain - 1) product + change)||^2 + ridge on (gain - 1) and change.
        """
        pp, pg, gg = (_tensor(x) for x in (self.product_product, self.product_gate, self.gate_gate))
        pe, ge = _tensor(self.product_error), _tensor(self.gate_error)
        pp, gg = pp + damping * pp.mean() + _TINY, gg + damping * gg.mean() + _TINY
        if not with_bias:
            pg, ge = torch.zeros_like(pg), torch.zeros_like(ge)
        gain = 1 + (pe * gg - ge * pg) / (pp * gg - pg.square()).clamp_min(_TINY)
        gain = gain.clamp(1 / LARGEST_GAIN, LARGEST_GAIN)
        return gain, (ge - (gain - 1) * pg) / gg

    def saved(self, gain: Tensor, change: Tensor) -> float:
        """By how much `gain` and `change` lower the weighted squared error of these samples; negative if they raise it."""
        pp, pg, gg = (_tensor(x) for x in (self.product_product, self.product_gate, self.gate_gate))
        more = gain - 1
        added = more.square() * pp + change.square() * gg + 2 * more * change * pg
        return float((2 * more * self.product_error + 2 * change * self.gate_error - added).sum())


def _tensor(value: Tensor | float) -> Tensor:
    assert isinstance(value, Tensor), "no sample was added"
    return value


@dataclass
class RepairSample:
    """One calibration sample on its way through all blocks."""

    stream: Sample
    """Both streams and, in between, the target; they stay where they are given."""
    least_activation_bits: int | None = None
    """Fewest activation bits of the quantized block at this sample's step; None for its layers' own."""
    unrepaired: Streams | None = None
    """Streams of quantized blocks none of which is repaired; kept of samples that are held back."""


@dataclass(frozen=True)
class BlockRepair:
    """What came of one block. Errors are `relative_error` of the stream after the block, over the samples held back."""

    without: float
    """With no block repaired."""
    before: float
    """With all blocks before this one repaired, as far as that was accepted."""
    after: float
    """With this one repaired too, accepted or not."""
    layers: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    """New `weight_scale` and `bias` by layer name inside the block; empty where the repair was not accepted."""

    @property
    def accepted(self) -> bool:
        """Whether the block was repaired."""
        return bool(self.layers)


def held_back(samples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """`(samples to fit, samples to judge by)`: every fourth one is held back; fewer than four serve both."""
    if len(samples) < _HOLD_BACK_EVERY:
        both = list(samples)
        return both, both
    judges = list(samples[_HOLD_BACK_EVERY - 1 :: _HOLD_BACK_EVERY])
    return [s for i, s in enumerate(samples) if i % _HOLD_BACK_EVERY != _HOLD_BACK_EVERY - 1], judges


def repair_block(
    call: BlockCall,
    blocks: tuple[nn.Module, nn.Module],
    samples: Sequence[RepairSample],
    *,
    bias_dtype: torch.dtype | None = None,
) -> BlockRepair:
    """Repairs the quantized block in place if that helps, and takes all samples through both blocks.

    Args:
        call: of the block; its family names the output layers.
        blocks: the full-precision block and the quantized one.
        samples: their `stream.reference` and `stream.quantized` are advanced by the block, `unrepaired` too.
        bias_dtype: in which biases are stored, to which they are rounded; None: that of the layers.
    """
    reference, quantized = blocks
    fitted, judges = held_back(samples)
    for sample in samples:
        here = sample.stream.at(reference)
        with torch.no_grad():
            sample.stream.target = moved_all(call(reference, here.reference, here.constants), sample.stream.home)
    before = _error(call, quantized, judges)
    without = _advance_unrepaired(call, quantized, judges)
    old: dict[str, dict[str, Tensor]] = {}
    for level in range(len(call.outputs)):
        moments = _level_moments(call, blocks, fitted, level=level)
        judging = moments if judges is fitted else _level_moments(call, blocks, judges, level=level)
        for layer, found in moments.items():
            state = _state(quantized, layer)
            gain, change = found.solve(with_bias="bias" in state)
            if judging[layer].saved(gain, change) > 0:
                old[layer] = state
                _set_state(quantized, layer, _changed(state, gain, change, bias_dtype))
    after = _error(call, quantized, judges) if old else before
    accepted = after < before
    if not accepted:
        for layer, state in old.items():
            _set_state(quantized, layer, state)
    for sample in samples:
        sample.stream.quantized = _output(call, quantized, sample, sample.stream.quantized)
        assert sample.stream.target is not None
        sample.stream.reference, sample.stream.target = sample.stream.target, None
    changed = {layer: _state(quantized, layer) for layer in old} if accepted else {}
    return BlockRepair(without, before, after, changed)


def _level_moments(
    call: BlockCall,
    blocks: tuple[nn.Module, nn.Module],
    samples: Sequence[RepairSample],
    *,
    level: int,
) -> dict[str, RepairMoments]:
    """Of the quantized output layers of one level, all in one pass."""
    reference, quantized = blocks
    moments: dict[str, RepairMoments] = {}
    for sample in samples:
        here = sample.stream.at(reference)
        exact = _after_level(call, reference, here.reference, here.constants, level=level)
        with least_activation_bits(sample.least_activation_bits):
            drifted = _after_level(call, quantized, here.quantized, here.constants, level=level)
        for output in call.outputs[level]:
            layer = quantized.get_submodule(output.layer)
            if isinstance(layer, QuantizedLinear):
                product, gate = drifted.seen[output.layer]
                if layer.bias is not None:
                    product = product.float() - layer.bias.float()
                rows = _rows(output, here.constants)
                wanted = exact.stream[rows]
                weights = 1 / wanted.square().mean(dim=-1).clamp_min(_TINY)
                moments.setdefault(output.layer, RepairMoments()).add(
                    product, gate, wanted - drifted.stream[rows], weights
                )
    return moments


def _changed(
    state: Mapping[str, Tensor], gain: Tensor, change: Tensor, bias_dtype: torch.dtype | None
) -> dict[str, Tensor]:
    new = {"weight_scale": (state["weight_scale"].double() * gain).float()}
    if "bias" in state:
        stored = (state["bias"].double() + change).to(bias_dtype or state["bias"].dtype)
        new["bias"] = stored.to(state["bias"].dtype)
    return new


@dataclass
class _Seen:
    """The stream `[L, d]` float32 right after a level's additions, and every output layer's output and gate."""

    stream: Tensor
    seen: dict[str, tuple[Tensor, Tensor]]


def _after_level(call: BlockCall, block: nn.Module, streams: Streams, constants: Constants, *, level: int) -> _Seen:
    levels = call.outputs
    with _watch(block, [output for outputs in levels for output in outputs]) as seen, torch.no_grad():
        call(block, streams, constants)
    stream = joined(streams).float()
    for outputs in levels[: level + 1]:
        stream = stream.clone()
        for output in outputs:
            value, gate = seen[output.layer]
            stream[_rows(output, constants)] += gate.float() * value.float()
    return _Seen(stream, seen)


@contextmanager
def _watch(block: nn.Module, outputs: Sequence[OutputLayer]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Fills a dictionary with the output `[N, n]` and the gate `[n]` of every one of `outputs` while it is open."""
    values: dict[str, Any] = {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: values.__setitem__(name, output)

    names = {output.layer for output in outputs} | {output.gate[0] for output in outputs}
    handles = [block.get_submodule(name).register_forward_hook(keep(name)) for name in sorted(names)]
    try:
        yield seen
        for output in outputs:
            module, place = output.gate
            seen[output.layer] = values[output.layer].flatten(0, -2), values[module][place].reshape(-1)
    finally:
        for handle in handles:
            handle.remove()


def _rows(output: OutputLayer, constants: Constants) -> slice:
    num_video = constants.layout.num_video
    return {"video": slice(0, num_video), "text": slice(num_video, None), "joint": slice(0, None)}[output.stream]


def _output(call: BlockCall, block: nn.Module, sample: RepairSample, streams: Streams) -> Streams:
    here = sample.stream.at(block)
    with torch.no_grad(), least_activation_bits(sample.least_activation_bits):
        out = call(block, moved_all(streams, here.device), here.constants)
    return moved_all(out, sample.stream.home)


def _error(call: BlockCall, block: nn.Module, samples: Sequence[RepairSample]) -> float:
    return relative_error(
        (_output(call, block, sample, sample.stream.quantized), sample.stream.target) for sample in samples
    )


def _advance_unrepaired(call: BlockCall, block: nn.Module, samples: Sequence[RepairSample]) -> float:
    for sample in samples:
        start = sample.stream.quantized if sample.unrepaired is None else sample.unrepaired
        sample.unrepaired = _output(call, block, sample, start)
    return relative_error((sample.unrepaired, sample.stream.target) for sample in samples)


def relative_error(pairs: Iterable[tuple[Streams | None, Streams | None]]) -> float:
    """Mean over the tokens of `||found - exact||^2 / ||exact||^2`, of pairs `(found, exact)`."""
    ratios = []
    for found, exact in pairs:
        assert found is not None
        assert exact is not None
        error = by_token(lambda f, e: (f.float() - e.float()).square().sum(dim=-1), found, exact)
        size = by_token(lambda e: e.float().square().sum(dim=-1), exact)
        ratios.append((error / size.clamp_min(_TINY)).mean(dtype=torch.float64).cpu())
    return float(torch.stack(ratios).mean())


def _state(block: nn.Module, name: str) -> dict[str, Tensor]:
    layer = block.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    return {"weight_scale": layer.weight_scale} | ({} if layer.bias is None else {"bias": layer.bias.data})


def _set_state(block: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    layer = block.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    layer.weight_scale = tensors["weight_scale"]
    if "bias" in tensors:
        layer.bias = nn.Parameter(tensors["bias"], requires_grad=False)
