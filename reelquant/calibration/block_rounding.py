"""From learned parameters to integers: rounds the layers of a block in the order in which the block calls them.

GPTQ's Hessian of a layer is that of the quantized path: the inputs it gets behind the layers of its block that are already
rounded, transformed and quantized as at run time, weighted by the token weights (method §9.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reelquant.calibration.block_call import BlockCall, Constants, Streams
from reelquant.calibration.calibrated_layers import CalibratedGroup, CalibratedLinear
from reelquant.calibration.sample import Sample, SampleView
from reelquant.metrics import sqnr_db
from reelquant.quantization.gptq import asymmetric_target, gptq_round
from reelquant.quantization.weight_grid import WeightGrid
from reelquant.settings.recipe import Recipe

EXACT_DB = 100.0
"""Stands for everything at or above it, an exact copy included: a finite number for tables and JSON."""


@dataclass
class RoundedLayer:
    """Integers of one layer, and its group's transform where it is the leader."""

    codes: Tensor
    grid: WeightGrid
    bias: Tensor | None
    weight_bits: int
    activation_bits: int
    layout: str
    leader: str
    """Name of the group's leader inside the block."""
    channel_scale: Tensor | None = None
    rotation: Tensor | None = None
    activation_clip: Tensor | None = None


class _Reached(Exception):
    """All inputs of a level are seen; the rest of the block need not run."""


def round_block(
    call: BlockCall,
    reference: nn.Module,
    block: nn.Module,
    *,
    groups: Sequence[Sequence[CalibratedGroup]],
    samples: Sequence[Sample],
    conditioning_rows: Tensor,
    recipe: Recipe,
) -> dict[str, RoundedLayer]:
    """Rounds all layers of `block` (the calibrated copy of `reference`) and fixes their weights in it.

    Args:
        conditioning_rows: `[M, d]`, what the modulation layers read at all candidates, not only at the samples.
    """
    rounded: dict[str, RoundedLayer] = {}
    for level in groups:
        for group in level:
            group.transform.freeze()
        moments = _moments(call, reference, block, level, samples, conditioning_rows, recipe)
        for group in level:
            leader = next(iter(group.layers))
            for name, layer in group.layers.items():
                rounded[name] = _round_layer(layer, recipe, moments.get(group.name), leader=leader)
            _attach_transform(rounded[leader], group)
    return rounded


def layer_sqnr(
    call: BlockCall, reference: nn.Module, block: nn.Module, layers: Sequence[str], samples: Sequence[Sample]
) -> dict[str, float]:
    """Signal to quantization noise of every layer's output in dB, on the first sample, each block on its own stream."""
    sample = samples[0].at(block)
    outputs: list[dict[str, Tensor]] = [{}, {}]
    streams = (sample.reference, sample.quantized)
    with torch.no_grad():
        for into, module, stream in zip(outputs, (reference, block), streams, strict=True):
            handles = [
                module.get_submodule(name).register_forward_hook(
                    lambda _m, _i, out, name=name, into=into: into.__setitem__(name, out)
                )
                for name in layers
            ]
            try:
                call(module, stream, sample.constants)
            finally:
                for handle in handles:
                    handle.remove()
    found = {name: float(sqnr_db(outputs[0][name].float(), outputs[1][name].float())) for name in layers}
    return {name: min(value, EXACT_DB) for name, value in found.items()}


def _attach_transform(layer: RoundedLayer, group: CalibratedGroup) -> None:
    scale, rotation = group.transform.parts()
    layer.channel_scale = scale
    layer.rotation = None if rotation is None else rotation.to(torch.bfloat16)
    if layer.activation_bits < 16:
        clip = group.transform.clip()
        layer.activation_clip = clip.detach().reshape(1) if isinstance(clip, Tensor) else torch.tensor([clip])


def _round_layer(
    layer: CalibratedLinear, recipe: Recipe, moments: tuple[Tensor, Tensor | None] | None, *, leader: str
) -> RoundedLayer:
    weight, grid = layer.transformed_weight().detach(), layer.grid()
    if moments is None:
        codes = grid.round(weight)
    else:
        hessian, cross = moments
        if cross is not None:
            weight = asymmetric_target(weight, cross, hessian, damping=recipe.damping)
        codes = gptq_round(weight, hessian, grid, damping=recipe.damping)
    layer.fix(grid.dequantize(codes))
    return RoundedLayer(codes, grid, layer.bias, layer.bits.weight, layer.bits.activation, layer.layout, leader)


@contextmanager
def _inputs_of(block: nn.Module, leaders: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the inputs of `leaders` in the next call of `block`, and ends that call once it has them all."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.reshape(-1, x.shape[-1])
        if len(seen) == len(leaders):
            raise _Reached

    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _m, inputs, name=name: keep(name, inputs[0]))
        for name in leaders
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def group_inputs(
    call: BlockCall, block: nn.Module, leaders: Sequence[str], streams: Streams, constants: Constants
) -> dict[str, Tensor]:
    """Inputs `[N, d]` of the layers `leaders` (all of one level) when `block` runs on `streams`."""
    with torch.no_grad(), _inputs_of(block, leaders) as seen, suppress(_Reached):
        call(block, streams, constants)
    return seen


def _moments(
    call: BlockCall,
    reference: nn.Module,
    block: nn.Module,
    level: Sequence[CalibratedGroup],
    samples: Sequence[Sample],
    conditioning_rows: Tensor,
    recipe: Recipe,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """By group: the Hessian `[d, d]` of the quantized inputs and, for the asymmetric solve, their product with the
    full-precision ones; float32, divided by the number of samples. Empty where nothing is to be minimized."""
    if recipe.rounding != "gptq":
        return {}
    moments: dict[str, tuple[Tensor, Tensor | None]] = {}
    streamed = [group for group in level if group.stream != "conditioning"]
    for group in level:
        if group.stream == "conditioning":
            rows = group.transform(conditioning_rows).float()
            group.transform.forget()
            moments[group.name] = (rows.T @ rows / len(rows), None)
    if not streamed:
        return moments
    leaders = {group.name: next(iter(group.layers)) for group in streamed}
    asymmetric = recipe.solve == "asymmetric"
    for sample in (stored.at(block) for stored in samples):
        found = group_inputs(call, block, list(leaders.values()), sample.quantized, sample.constants)
        exact = (
            group_inputs(call, reference, list(leaders.values()), sample.reference, sample.constants)
            if asymmetric
            else {}
        )
        for group in streamed:
            leader = leaders[group.name]
            with torch.no_grad():
                rows = group.transform(found[leader]).float()
            group.transform.forget()
            weighted = rows * stream_weights(call, group.stream, sample)
            hessian = weighted.T @ rows / len(samples)
            cross = None
            if asymmetric:
                cross = group.transform.transformed(exact[leader]).float().T @ weighted / len(samples)
            if group.name in moments:
                hessian = hessian + moments[group.name][0]
                previous = moments[group.name][1]
                cross = None if cross is None or previous is None else cross + previous
            moments[group.name] = (hessian, cross)
    return moments


def stream_weights(call: BlockCall, stream: str, sample: SampleView | Sample) -> Tensor | float:
    """Weights `[N, 1]` of the rows that layers of `stream` read; what reads all tokens has the text where attention has it."""
    if sample.weights is None or stream == "apart":
        return 1.0
    num_video = sample.constants.layout.num_video
    video, text = sample.weights[:num_video], sample.weights[num_video:]
    joint = torch.cat([text, video] if call.family.text == "before" else [video, text])
    return {"joint": joint, "video": video, "text": text}[stream].unsqueeze(1)
