"""One block called alone is the block inside the model; groups read one tensor; queries and keys are what attention sees."""

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from reelquant.families import hunyuan_video as family
from reelquant.tokens import TokenLayout
from tests.errors import raises

ROOT = Path(__file__).resolve().parents[3]
NUM_TEXT, NUM_PADDED = 5, 8


@pytest.fixture(scope="module")
def model() -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    built = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return built.eval().requires_grad_(False)


@pytest.fixture
def inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 3, 6, 10),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, NUM_PADDED, 12),
        "encoder_attention_mask": (torch.arange(NUM_PADDED) < NUM_TEXT).long().unsqueeze(0),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }


@contextmanager
def recorded(
    model: nn.Module, names: tuple[str, ...]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]]:
    """Input and output streams `[L, d]` of blocks without padded text, and the timestep embedding."""
    entry: dict[str, Tensor] = {}
    exit_: dict[str, Tensor] = {}
    temb: list[Tensor] = []

    def stream(video: Tensor, text: Tensor) -> Tensor:
        return torch.cat([video[0], text[0, :NUM_TEXT]])

    handles = [model.get_submodule("time_text_embed").register_forward_hook(lambda _m, _i, out: temb.append(out[0]))]
    for name in names:
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(lambda _m, i, name=name: entry.update({name: stream(*i[:2])})))
        handles.append(block.register_forward_hook(lambda _m, _i, o, name=name: exit_.update({name: stream(*o)})))
    yield entry, exit_, temb
    for handle in handles:
        handle.remove()


def conditioning_of(model: Any, temb: Tensor, latents: Tensor) -> family.Conditioning:
    layout = family.token_layout(model.config, tuple(latents.shape), NUM_TEXT)
    assert layout.num_tokens == 3 * 3 * 5 + NUM_TEXT
    return family.Conditioning(temb, family.rotary_embedding(model.config, layout), layout)


def test_a_block_called_alone_without_padding_is_the_block_inside_the_model(model: Any, inputs: dict[str, Any]) -> None:
    names = family.block_names(model.config)
    assert len(names) == 4
    with recorded(model, names) as (entry, exit_, temb):
        model(**inputs)
    conditioning = conditioning_of(model, temb[0], inputs["hidden_states"])
    for name in names:
        alone = family.build_block(model.config, name)
        alone.load_state_dict(model.get_submodule(name).state_dict())
        with torch.no_grad():
            out = family.call_block(alone.eval(), entry[name], conditioning)
        error = float((out - exit_[name]).norm() / exit_[name].norm())
        assert error < 1e-6, (name, error)


def test_layers_of_a_group_read_the_same_tensor(model: Any, inputs: dict[str, Any]) -> None:
    for name in family.block_names(model.config):
        block = model.get_submodule(name)
        seen: dict[str, Tensor] = {}
        groups = [group for level in family.group_levels(name) for group in level]
        order: list[str] = []

        def see(
            layer: str, inputs: tuple[Tensor, ...], seen: dict[str, Tensor] = seen, order: list[str] = order
        ) -> None:
            seen[layer] = inputs[0]
            order.append(layer)

        handles = [
            block.get_submodule(layer).register_forward_pre_hook(lambda _m, i, layer=layer, see=see: see(layer, i))
            for group in groups
            for layer in group.layers
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        assert set(seen) == {n for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        for group in groups:
            for layer in group.layers[1:]:
                assert torch.equal(seen[layer], seen[group.layers[0]]), (name, layer)
            assert list(group.layers) == sorted(group.layers, key=order.index), (
                "layers stand in the order of their calls"
            )


@pytest.mark.parametrize("name", ["transformer_blocks.1", "single_transformer_blocks.1"])
def test_watched_attention_is_what_diffusers_computes_with(
    model: Any, inputs: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers.models.transformers.transformer_hunyuan_video as source

    with recorded(model, (name,)) as (entry, _, temb):
        model(**inputs)
    dispatched: list[tuple[Tensor, ...]] = []
    original = source.dispatch_attention_fn

    def dispatch(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        dispatched.append((query, key, value))
        out: Tensor = original(query, key, value, **kwargs)
        return out

    monkeypatch.setattr(source, "dispatch_attention_fn", dispatch)
    observed: list[tuple[Tensor, ...]] = []
    conditioning = conditioning_of(model, temb[0], inputs["hidden_states"])
    block = model.get_submodule(name)
    with family.watch_attention(block, lambda q, k, v: observed.append((q, k, v))):
        watched = family.call_block(block, entry[name], conditioning)
    assert torch.equal(family.call_block(block, entry[name], conditioning), watched)
    assert len(observed) == 1, "nobody watches after the context"
    for seen, used in zip(observed[0], dispatched[0], strict=True):
        assert torch.equal(seen, used[0].transpose(0, 1))


@pytest.mark.parametrize("name", ["transformer_blocks.1", "single_transformer_blocks.1"])
def test_a_stream_without_text_is_refused(model: Any, name: str) -> None:
    """diffusers' block would take all rows for text and none for video."""
    layout = TokenLayout(2, 3, 4, 0)
    conditioning = family.Conditioning(torch.zeros(1, 32), family.rotary_embedding(dict(model.config), layout), layout)
    block = model.get_submodule(name)
    with raises(ValueError, 0, "prompt"):
        family.call_block(block, torch.zeros(24, 32), conditioning)
    with raises(ValueError, 0, "prompt"):
        family.call_block_rows(block, torch.zeros(24, 32), conditioning, torch.arange(5))


def test_nothing_is_cut_off_at_minus_a_number_that_may_be_0() -> None:
    """`x[:-n]` is empty for n = 0, and `x[-n:]` everything. Constants are not 0."""
    sources = [
        path for folder in ("reelquant", "workers", "pipeline", "storage") for path in (ROOT / folder).rglob("*.py")
    ]
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Slice)
        for end in (node.lower, node.upper)
        if isinstance(end, ast.UnaryOp) and isinstance(end.op, ast.USub) and re.search("[a-z]", ast.unparse(end))
    ]
    assert found == []
    assert len(sources) > 200


def test_unknown_blocks_and_kinds_are_refused(model: Any) -> None:
    with raises(ValueError, "transformer_blocks.2", "transformer_blocks.0-1", "single_transformer_blocks.0-1"):
        family.build_block(model.config, "transformer_blocks.2")
    with raises(ValueError, "image_condition_type", "token_replace"):
        family.build_block({**model.config, "image_condition_type": "token_replace"}, "transformer_blocks.0")


def test_layers_outside_the_blocks(model: Any) -> None:
    kinds = {n: family.auxiliary_kind(n) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    outside = {n: k for n, k in kinds.items() if "transformer_blocks." not in n}
    assert outside["proj_out"] is None
    assert {k for n, k in outside.items() if n != "proj_out"} == {"refiner", "embedder"}
    assert all(kinds[n] is None for n in kinds if n not in outside)
