"""A block computed for some tokens equals the same rows of the whole block, output and gradients, quantized or not."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant.attention.column_sums import attention_column_sums
from reelquant.calibration.block_call import Constants, Streams, joined
from reelquant.calibration.block_distillation import calibrated_copy
from reelquant.calibration.calibrated_layers import CalibratedGroup
from reelquant.calibration.token_rows import token_rows
from reelquant.ops.band_attention.op import dense_attention
from reelquant.settings.recipe import Recipe
from tests.reelquant.narrow_blocks import (
    BLOCKS,
    bits_of,
    calls_of,
    config_of,
    constants_of,
    layout_of,
    new_block,
    streams_of,
)

WIDTH = 48
CONFIG = config_of(num_attention_heads=3)
CALLS = calls_of(CONFIG)
LEARNED = Recipe(
    channel_scale="learned", rotation="learned", clip="learned", rounding="gptq", weight_layout="two_level", epochs=1,
    rotation_block=16,
)  # fmt: skip


def make_block(name: str) -> nn.Module:
    """A block in float64 with biases and norms of some size."""
    torch.manual_seed(1)
    block = new_block(CONFIG, name).double()
    for parameter in block.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return block


def make_inputs(num_text: int) -> tuple[Streams, Constants, Tensor]:
    """Streams, what the block reads besides (rotary tables in float32, as always), and rows of half of the video and all of
    the text."""
    layout = layout_of(CONFIG, (4, 3, 6, 10), num_text)
    generator = torch.Generator().manual_seed(num_text)
    stream = torch.randn(layout.num_tokens, WIDTH, generator=generator, dtype=torch.float64)
    temb = torch.randn(1, WIDTH, generator=generator, dtype=torch.float64)
    rows = token_rows(layout, 0.5, seed=num_text)
    assert rows is not None
    return streams_of(stream, layout), constants_of(CONFIG, layout, temb), rows.indices


def in_dtype(constants: Constants, device: str, dtype: torch.dtype) -> Constants:
    """With the timestep embedding in `dtype`, the tables as they are."""
    calls = {kind: {**call, "temb": call["temb"].to(dtype)} for kind, call in constants.calls.items()}
    return replace(constants, calls=calls).to(device)


def quantized(name: str) -> tuple[nn.Module, list[list[CalibratedGroup]]]:
    """All linears calibrated, in the middle of learning: nothing is at its start value."""
    levels = CALLS[name].levels
    block, groups = calibrated_copy(make_block(name), levels, bits=bits_of(name), recipe=LEARNED, activation_amax={})
    block.double()
    generator = torch.Generator().manual_seed(2)
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    CALLS[name].set_core(block, lambda _item, q, k, v: dense_attention(q, k, v))
    return block, groups


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("num_text", [1, 5, 13])
@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_gradients_are_those_of_the_whole_block(name: str, num_text: int) -> None:
    block = make_block(name)
    streams, constants, rows = make_inputs(num_text)
    weights = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = {}
    for kind in ("whole", "rows"):
        block.zero_grad()
        hidden = joined(streams).clone().requires_grad_()
        own = streams_of(hidden, constants.layout)
        if kind == "whole":
            out = joined(CALLS[name](block, own, constants))[rows]
        else:
            out = CALLS[name].rows(block, own, constants, rows)
        (out * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
        assert len(gradients) == len(list(block.parameters()))
        assert hidden.grad is not None
        found[kind] = (out.detach(), {**gradients, "stream": hidden.grad})
    assert difference(found["rows"][0], found["whole"][0]) < 1e-7  # 2e-16, but the rotary embedding works in float32
    for key, gradient in found["rows"][1].items():
        assert difference(gradient, found["whole"][1][key]) < 1e-7, key


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_differs_by_its_rounding_only(name: str, device: str) -> None:
    """Products and attention of fewer rows may add up in another order."""
    streams, constants, rows = make_inputs(5)
    block = make_block(name).to(device, torch.bfloat16)
    own = {key: stream.to(device, torch.bfloat16) for key, stream in streams.items()}
    constants = in_dtype(constants, device, torch.bfloat16)
    with torch.no_grad():
        whole = joined(CALLS[name](block, own, constants))[rows.to(device)].float()
        part = CALLS[name].rows(block, own, constants, rows.to(device)).float()
    assert difference(part, whole) < 5e-3  # on a CPU 0


@pytest.mark.parametrize("num_text", [2, 9])
@pytest.mark.parametrize("name", BLOCKS)
def test_quantized_blocks_learn_the_same(name: str, num_text: int) -> None:
    block, groups = quantized(name)
    streams, constants, rows = make_inputs(num_text)
    target = joined(CALLS[name](make_block(name), streams, constants))[rows].detach()
    found = {}
    for kind in ("whole", "rows"):
        block.zero_grad()
        if kind == "whole":
            out = joined(CALLS[name](block, streams, constants))[rows]
        else:
            out = CALLS[name].rows(block, streams, constants, rows)
        (out - target).square().mean().backward()
        found[kind] = (out.detach(), {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None})
    assert difference(found["whole"][0], target) > 0.02, "there is an error to learn from"
    assert difference(found["rows"][0], found["whole"][0]) < 1e-7
    learned = {n for n, p in block.named_parameters() if p.requires_grad}
    assert len(learned) > 3 * sum(len(level) for level in groups[1:])
    for key in learned:
        assert float(found["whole"][1][key].norm()) > 0, key
        assert difference(found["rows"][1][key], found["whole"][1][key]) < 1e-7, key  # 6e-14


@pytest.mark.parametrize("name", BLOCKS)
def test_layers_that_read_one_tensor_share_its_transform(name: str) -> None:
    """Two inputs at most where a part of the layers reads all tokens; one everywhere else."""
    block, groups = quantized(name)
    streams, constants, rows = make_inputs(5)
    calls: dict[str, int] = {}
    for group in (group for level in groups for group in level):

        def count(x: Tensor, group: CalibratedGroup = group, inner: Any = group.transform.transformed) -> Tensor:
            calls[group.name] = calls.get(group.name, 0) + 1
            out: Tensor = inner(x)
            return out

        group.transform.transformed = count  # type: ignore[method-assign]
    CALLS[name].rows(block, streams, constants, rows)
    twice = {"transformer_blocks.0": "attn.to_q", "single_transformer_blocks.0": "proj_mlp"}[name]
    # The modulation of video and text reads `silu(temb)`, which each computes anew.
    assert {key: num for key, num in calls.items() if not key.endswith(".linear")} == {
        group.name: 1 + (group.name == twice) for level in groups[1:] for group in level
    }


@pytest.mark.parametrize("name", BLOCKS)
def test_watchers_see_all_queries_and_hooks_fire_once(name: str) -> None:
    block = make_block(name)
    streams, constants, rows = make_inputs(5)
    call = CALLS[name]
    plain = call.rows(block, streams, constants, rows)
    seen: dict[str, list[tuple[Tensor, ...]]] = {"whole": [], "inner": [], "outer": []}
    with call.watch_attention(block, lambda *qkv: seen["whole"].append(qkv)):
        call(block, streams, constants)
    fired: list[str] = []
    hooks = [
        block.get_submodule(layer).register_forward_hook(lambda *_, layer=layer: fired.append(layer))
        for level in call.levels
        for group in level
        for layer in group.layers
    ]
    with (
        call.watch_attention(block, lambda *qkv: seen["inner"].append(qkv)),
        call.watch_attention(block, lambda *qkv: seen["outer"].append(qkv)),
    ):
        watched = call.rows(block, streams, constants, rows)
    for hook in hooks:
        hook.remove()
    assert len(fired) == len(set(fired)) == len(hooks)
    assert difference(watched, plain) < 1e-7
    for kind in ("inner", "outer"):
        [observed] = seen[kind]
        for ours, whole in zip(observed, seen["whole"][0], strict=True):
            assert difference(ours, whole) < 1e-12
    assert attention_column_sums(*seen["inner"][0][:2]).shape == (constants.layout.num_tokens,)


def test_a_core_that_asks_is_told_which_sample_comes() -> None:
    class Core:
        def __init__(self) -> None:
            self.layouts: list[Any] = []
            self.queries: list[int] = []

        def prepare(self, constants: Constants) -> None:
            self.layouts.append(constants.layout)

        def __call__(self, _item: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.queries.append(q.shape[1])
            return dense_attention(q, k, v)

    for name in BLOCKS:
        block, core = copy.deepcopy(make_block(name)), Core()
        CALLS[name].set_core(block, core)
        streams, constants, rows = make_inputs(5)
        CALLS[name].rows(block, streams, constants, rows)
        with CALLS[name].watch_attention(block, lambda *_: None):
            CALLS[name].rows(block, streams, constants, rows)
        assert core.layouts == [constants.layout] * 2
        assert core.queries == [len(rows)] * 2, "nobody attends with what only watchers need"
