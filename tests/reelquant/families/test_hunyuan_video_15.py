"""What HunyuanVideo-1.5's declaration says, beside what holds for every family (`test_conformance`)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant.calibration.block_call import Recording, Streams, real_text, without_padding
from reelquant.calibration.input_groups import block_calls
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.families.attention_core import plain_core, set_attention_core
from reelquant.families.hunyuan_video_15 import FAMILY
from reelquant.quantization.layer_spec import LayerSpec
from reelquant.quantization.linear import replace_linear_layers
from reelquant.runtime.attach import attach_runtime
from tests.errors import raises
from tests.reelquant.families.tiny_models import TINY
from tests.reelquant.runtime.test_block_fusion import quantized_group
from workers.model_source import empty_block

TINY_MODEL = TINY["HunyuanVideo-1.5"]


@pytest.fixture(scope="module")
def model() -> Any:
    return TINY_MODEL.model()


def batch(*lengths: tuple[int, int]) -> dict[str, Any]:
    """A call for videos with so many real tokens of both texts."""
    torch.manual_seed(2)
    num, (text, glyphs) = len(lengths), (torch.tensor(own)[:, None] for own in zip(*lengths, strict=True))
    return {
        "hidden_states": torch.randn(num, 9, 2, 4, 4),
        "timestep": torch.full((num,), 500.0),
        "encoder_hidden_states": torch.randn(num, 6, 16),
        "encoder_attention_mask": (torch.arange(6) < text).float(),
        "encoder_hidden_states_2": torch.randn(num, 4, 8),
        "encoder_attention_mask_2": (torch.arange(4) < glyphs).float(),
        "image_embeds": torch.zeros(num, 3, 12),
        "return_dict": False,
    }


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_dropped_padding_of_both_texts_changes_no_real_token(model: Any) -> None:
    call = batch((5, 3))
    short = without_padding(FAMILY, call)
    assert [short[name].shape[1] for name in ("encoder_hidden_states", "encoder_hidden_states_2")] == [5, 3]
    assert short["image_embeds"].shape == (1, 0, 12)
    with torch.no_grad():
        padded, whole = (model(**arguments)[0] for arguments in (call, short))
    assert error(padded, whole) < 1e-6
    image = torch.randn(1, 3, 12)
    assert torch.equal(without_padding(FAMILY, {**call, "image_embeds": image})["image_embeds"], image)


def test_the_blocks_see_real_tokens_first(model: Any) -> None:
    found: list[Tensor] = []
    block = model.transformer_blocks[0]
    handle = block.register_forward_pre_hook(lambda _module, args: found.append(args[1]))
    with torch.no_grad():
        for call in (batch((5, 3)), without_padding(FAMILY, batch((5, 3)))):
            model(**call)
    handle.remove()
    real = real_text(FAMILY, batch((5, 3)))
    assert error(found[0][0][real], found[1][0]) < 1e-6
    assert found[0].shape[1] > len(found[1][0]) == 8
    image = {**batch((5, 3)), "image_embeds": torch.ones(1, 3, 12)}
    assert real_text(FAMILY, image) == slice(11), "the image's tokens in front of them"


def test_a_core_sees_each_video_without_its_padding(model: Any) -> None:
    call, seen = batch((5, 0), (6, 4)), []
    with torch.no_grad():
        expected = model(**call)[0]

    def core(item: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((item, q.shape[1] - 32))
        return plain_core(item, q, k, v)

    for block in model.transformer_blocks:
        set_attention_core(FAMILY, block, core)
    with torch.no_grad():
        found = model(**call)[0]
    for block in model.transformer_blocks:
        set_attention_core(FAMILY, block, None)
    assert seen == [(0, 5), (1, 10)] * 3
    assert error(found, expected) < 1e-6
    with torch.no_grad():
        assert torch.equal(model(**call)[0], expected)


def test_some_rows_of_a_block_are_those_of_the_whole(model: Any) -> None:
    call = without_padding(FAMILY, batch((5, 3)))
    name = FAMILY.block_names(model.config)[0]
    entries: list[Streams] = []
    recording = Recording(FAMILY, model, call, [name])
    with torch.no_grad(), recording.watching(lambda _name, streams: entries.extend([streams] if streams else [])):
        model(**call)
    block, block_call, constants = (
        model.get_submodule(name),
        block_calls(FAMILY, model.config)[name],
        recording.constants,
    )
    assert constants is not None
    assert "attention_mask" not in constants.calls["transformer_blocks"]
    rows = torch.tensor([1, 7, 30, *range(32, 40)])
    set_attention_core(FAMILY, block, None)
    with torch.no_grad():
        whole = torch.cat([x[0] for x in block_call(block, entries[0], constants).values()])
        assert error(block_call.rows(block, entries[0], constants, rows), whole[rows]) < 1e-6


def test_fused_blocks_compute_what_single_operations_do() -> None:
    model = TINY_MODEL.model()
    layers: dict[str, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    for name, call in block_calls(FAMILY, model.config).items():
        for group in (group for level in call.levels for group in level):
            bits = (4, 16 if group.stream == "conditioning" else 8)
            found = quantized_group(model, [f"{name}.{layer}" for layer in group.layers], "per_channel", bits)
            layers.update(found[0])
            tensors.update(found[1])
    replace_linear_layers(model, layers)
    model.load_state_dict(model.state_dict() | tensors, strict=True)
    attach_runtime(model, QuantizationSpec("W4A8", "test", layers))
    made: dict[str, Tensor] = {}
    for mode in ("off", "on"):
        model.block_fusion.mode = mode
        with torch.no_grad():
            made[mode] = model(**batch((5, 0), (6, 4)))[0]
    assert 0 < error(made["on"], made["off"]) < 1e-2, "one INT8 code apart here and there"


def test_models_that_cannot_run_are_refused(model: Any) -> None:
    with raises(ValueError, 16, 18):
        empty_block({**model.config, "rope_axes_dim": (6, 6, 6)}, FAMILY, "transformer_blocks.0")


def test_layers_outside_the_blocks(model: Any) -> None:
    kinds = {n: FAMILY.auxiliary_kind(n) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    outside = {n: k for n, k in kinds.items() if not n.startswith("transformer_blocks.")}
    assert {n for n, k in outside.items() if k is None} == {
        "proj_out",
        "image_embedder.linear_1",
        "image_embedder.linear_2",
    }
    assert set(outside.values()) == {"refiner", "embedder", None}
