"""Which linears of a block read one tensor, found by running the model without values, on the meta device.

| a linear reads | it belongs to |
|---|---|
| the very tensor that another one reads | its group |
| a tensor that the family says to equal another one's (`Family.joined`) | its group |
| a row a sample, no tokens | the stream `conditioning` |
| an argument of the block that is no stream (text states of cross-attention) | the stream `apart` |
| as many tokens as the video, the text or both have | the stream `video`, `text` or `joint` |

Groups stand in levels: the inputs of a level depend only on the layers of the levels before it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reelquant.calibration.block_call import BlockCall, arguments, streams_of
from reelquant.calibration.without_values import answers
from reelquant.families.family import (
    Arguments,
    Config,
    Family,
    InputGroup,
    Levels,
    StreamName,
    VideoSize,
    empty_transformer,
    family_of_architecture,
)

SIZE = VideoSize(frames=4, height=8, width=12, num_text=7, num_image=5)
"""Of the call: no two streams are as long, so that they are told apart by their length."""


def block_calls(family: Family, config: Config) -> dict[str, BlockCall]:
    """How the blocks of a model are called, by name in model order."""
    # Where a model was loaded from, as it was named, changes nothing.
    decides = {name: value for name, value in config.items() if name != "_name_or_path"}
    return _block_calls(family.architecture, json.dumps(decides, sort_keys=True, default=list))


@lru_cache(maxsize=8)
def _block_calls(architecture: str, config: str) -> dict[str, BlockCall]:
    return find_block_calls(family_of_architecture(architecture), json.loads(config))


def find_block_calls(family: Family, config: Config) -> dict[str, BlockCall]:
    """As `block_calls`, of a family that need not be one of the package's."""
    # Blocks of one list are alike, but the last one may do without what nobody reads (Mochi's text).
    short = {**config, **{key: min(2, config[key]) for key in family.blocks.values()}}
    transformer = empty_transformer(short, family.architecture)
    known: dict[str, BlockCall] = {}
    with torch.device("meta"), answers():
        call = family.inputs(short, SIZE)
        calls = _calls(transformer, family.block_names(short), call)
        num_video = family.layout(short, call, 0).num_video
        for name, own in calls.items():
            block = transformer.get_submodule(name)
            streams = streams_of(family, block, own)
            outputs = family.output_layers(config, name)
            known[name] = BlockCall(family, name, _levels(family, block, own, num_video), tuple(streams), outputs)
    found = {}
    for modules, key in family.blocks.items():
        for index in range(config[key]):
            like = known[f"{modules}.{0 if index + 1 < config[key] else short[key] - 1}"]
            found[f"{modules}.{index}"] = replace(like, name=f"{modules}.{index}")
    return found


def _calls(transformer: nn.Module, names: Sequence[str], call: Arguments) -> dict[str, Arguments]:
    calls: dict[str, Arguments] = {}
    handles = [
        transformer.get_submodule(name).register_forward_pre_hook(
            lambda block, args, kwargs, name=name: calls.__setitem__(name, arguments(block, args, kwargs)),
            with_kwargs=True,
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            transformer(**call)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _levels(family: Family, block: nn.Module, call: Arguments, num_video: int) -> Levels:
    inputs: dict[str, Tensor] = {}
    num_calls: Counter[str] = Counter()
    outputs: dict[str, Tensor] = {}
    needs: dict[str, set[str]] = {}

    def before(name: str, x: Tensor) -> None:
        inputs.setdefault(name, x)
        num_calls[name] += 1
        leaves = list(outputs.values())
        found = torch.autograd.grad(x.sum(), leaves, allow_unused=True, retain_graph=True) if x.requires_grad else ()
        needs[name] = needs.get(name, set()) | {
            layer for layer, grad in zip(outputs, found, strict=False) if grad is not None
        }

    def after(name: str, out: Tensor) -> Tensor:
        outputs[name] = out.detach().requires_grad_()
        return outputs[name]

    handles = []
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear):
            handles.append(layer.register_forward_pre_hook(lambda _m, args, name=name: before(name, args[0])))
            handles.append(layer.register_forward_hook(lambda _m, _i, out, name=name: after(name, out)))
    try:
        with torch.enable_grad():
            block.requires_grad_(False)(**call)
    finally:
        for handle in handles:
            handle.remove()
    streams = streams_of(family, block, call)
    constant = [leaf for name, value in call.items() if name not in streams for leaf in tree_leaves(value)]
    lengths = {"video": num_video, "text": sum(x.shape[1] for n, x in streams.items() if n != "hidden_states")}
    groups = [
        InputGroup(_stream(inputs[layers[0]], lengths, constant), layers, num_calls[layers[0]])
        for layers in _grouped(family, inputs)
    ]
    depths: dict[str, int] = {}
    for group in groups:
        depth = max((depths[need] + 1 for layer in group.layers for need in needs[layer]), default=0)
        depths.update(dict.fromkeys(group.layers, depth))
    return tuple(
        tuple(group for group in groups if depths[group.name] == depth)
        for depth in range(max(depths.values(), default=-1) + 1)
    )


def _grouped(family: Family, inputs: Mapping[str, Tensor]) -> Sequence[tuple[str, ...]]:
    """Layers by what they read, in the order of their calls."""
    joined = {layer: index for index, layers in enumerate(family.joined) for layer in layers}
    groups: dict[Any, list[str]] = {}
    for layer, x in inputs.items():
        # The tensors are all alive: an identity is that of one tensor.
        groups.setdefault(joined.get(layer, id(x)), []).append(layer)
    return [tuple(layers) for layers in groups.values()]


def _stream(x: Tensor, lengths: Mapping[str, int], constant: Sequence[Any]) -> StreamName:
    if x.ndim == 2:
        return "conditioning"
    tokens = x.shape[-2]
    if any(leaf is x for leaf in constant) or tokens not in (*lengths.values(), sum(lengths.values())):
        return "apart"
    if tokens == lengths["video"]:
        return "video"
    return "text" if tokens == lengths["text"] else "joint"
