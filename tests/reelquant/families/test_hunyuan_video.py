"""What HunyuanVideo's declaration says, beside what holds for every family (`test_conformance`)."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from reelquant.calibration.block_call import without_padding
from reelquant.calibration.input_groups import block_calls, find_block_calls
from reelquant.families.hunyuan_video import FAMILY
from reelquant.families.hunyuan_video_fused import fusion_obstacle
from tests.errors import raises
from tests.reelquant.families.tiny_models import TINY
from workers.model_source import empty_block

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model() -> Any:
    return TINY["HunyuanVideo"].model()


def test_dropped_padding_changes_no_real_token(model: Any) -> None:
    call = TINY["HunyuanVideo"].call()
    call["encoder_attention_mask"] = (torch.arange(8) < 5).float().unsqueeze(0)
    short = without_padding(FAMILY, call)
    assert short["encoder_hidden_states"].shape == (1, 5, 12)
    with torch.no_grad():
        padded, whole = (model(**arguments)[0] for arguments in (call, short))
    assert float((padded - whole).norm() / whole.norm()) < 1e-6


def test_a_text_of_nothing_but_padding_is_refused() -> None:
    """diffusers' block would take all rows for text and none for video."""
    call = TINY["HunyuanVideo"].call()
    call["encoder_attention_mask"] = torch.zeros(1, 8)
    with raises(ValueError, 0, "prompt"):
        without_padding(FAMILY, call)


def test_the_groups_of_the_real_model() -> None:
    """Modulation of both streams is one group, and what a single-stream block reads at its beginning."""
    with torch.device("meta"):
        config = dict(HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1).config)
    found = {
        name: [[(group.stream, group.layers) for group in level] for level in call.levels]
        for name, call in block_calls(FAMILY, config).items()
    }
    assert found == {
        "transformer_blocks.0": [
            [("conditioning", ("norm1.linear", "norm1_context.linear"))],
            [
                ("video", ("attn.to_q", "attn.to_k", "attn.to_v")),
                ("text", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
            ],
            [("video", ("attn.to_out.0",)), ("text", ("attn.to_add_out",))],
            [("video", ("ff.net.0.proj",)), ("text", ("ff_context.net.0.proj",))],
            [("video", ("ff.net.2",)), ("text", ("ff_context.net.2",))],
        ],
        "single_transformer_blocks.0": [
            [("conditioning", ("norm.linear",))],
            [("joint", ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"))],
            [("joint", ("proj_out",))],
        ],
    }


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
        empty_block(model.config, FAMILY, "transformer_blocks.2")
    with raises(ValueError, "image_condition_type", "latent_concat", 9):
        empty_block({**model.config, "image_condition_type": "latent_concat"}, FAMILY, "transformer_blocks.0")
    with raises(ValueError, 16, 18):
        empty_block({**model.config, "rope_axes_dim": (6, 6, 6)}, FAMILY, "transformer_blocks.0")


def test_layers_outside_the_blocks(model: Any) -> None:
    kinds = {n: FAMILY.auxiliary_kind(n) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    outside = {n: k for n, k in kinds.items() if "transformer_blocks." not in n}
    assert outside["proj_out"] is None
    assert {k for n, k in outside.items() if n != "proj_out"} == {"refiner", "embedder"}
    assert all(kinds[n] is None for n in kinds if n not in outside)


@pytest.mark.parametrize(
    ("name", "obstacle"), [("token_replace", "tokens of an image"), ("latent_concat", "quantized")]
)
def test_blocks_that_modulate_an_images_tokens_apart_are_not_fused(name: str, obstacle: str) -> None:
    model = TINY[f"HunyuanVideo {name}"].model()
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        assert obstacle in str(fusion_obstacle(block))


def test_calls_of_a_layer_are_counted() -> None:
    """The modulation of token_replace reads two embeddings."""
    counts = {}
    for condition in ("latent_concat", "token_replace"):
        calls = find_block_calls(FAMILY, TINY[f"HunyuanVideo {condition}"].model().config)
        groups = [group for level in calls["transformer_blocks.0"].levels for group in level]
        counts[condition] = {group.name: group.num_calls for group in groups if group.num_calls > 1}
    assert counts == {"latent_concat": {}, "token_replace": {"norm1.linear": 2}}
