import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelquant.checkpoint.layer_packing import pack_layer, read_block_artifact, write_block_artifact
from reelquant.quantization.layer_spec import LayerSpec
from reelquant.quantization.packing import unpack_bits
from reelquant.quantization.rotation import hadamard
from reelquant.quantization.weight_grid import fit_per_channel, fit_two_level
from tests.errors import raises


def parts(layout: str = "two_level", **changes: Any) -> dict[str, Any]:
    weight = torch.randn(7, 72)
    grid = (fit_two_level if layout == "two_level" else fit_per_channel)(weight, 4)
    return {
        "codes": grid.round(weight),
        "grid": grid,
        "bias": torch.randn(7).bfloat16(),
        "activation_bits": 6,
        "channel_scale": torch.rand(72) + 0.5,
        "rotation": hadamard(8),
        "activation_clip": torch.tensor(0.9),
        **changes,
    }


@pytest.fixture
def block() -> tuple[dict[str, Tensor], dict[str, LayerSpec]]:
    """Two layers of one group."""
    tensors, leader = pack_layer("block.q", **parts())
    more, member = pack_layer("block.k", **parts("per_channel"), group="block.q")
    return tensors | more, {"block.q": leader, "block.k": member}


@pytest.mark.parametrize("layout", ["two_level", "per_channel"])
def test_leader_has_what_the_format_says(layout: str) -> None:
    given = parts(layout)
    tensors, spec = pack_layer("q", **given)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    two_level = {"q.group_scale": (torch.uint8, (7, 2))} if layout == "two_level" else {}
    assert found == two_level | {
        "q.weight_packed": (torch.uint8, (7, 36)),
        "q.weight_scale": (torch.float32, (7,)),
        "q.bias": (torch.bfloat16, (7,)),
        "q.channel_scale": (torch.float32, (72,)),
        "q.rotation": (torch.bfloat16, (8, 8)),
        "q.activation_clip": (torch.float32, (1,)),
    }
    assert torch.equal(unpack_bits(tensors["q.weight_packed"], 4, 72), given["codes"])
    assert (spec.group, spec.weight_layout, spec.channel_scale, spec.rotation) == ("q", layout, True, 8)
    assert len(spec.digest) == 16


def test_member_stores_nothing_of_the_group_however_it_is_described() -> None:
    given = parts()
    tensors, spec = pack_layer("k", **given, group="q")
    described = {**given, "channel_scale": None, "rotation": None, "activation_clip": None}
    other = pack_layer("k", **described, group="q", group_has_channel_scale=True, group_rotation=8)
    assert set(tensors) == {"k.weight_packed", "k.weight_scale", "k.group_scale", "k.bias"}
    assert other[1] == spec
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in other[0].items())


def test_bias_does_not_change_the_digest() -> None:
    given = parts()
    assert pack_layer("q", **given)[1] == pack_layer("q", **{**given, "bias": None})[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codes": torch.full((7, 72), -8, dtype=torch.int8)}, ("codes", 8, "4 bits")),
        ({"codes": torch.zeros(7, 72)}, ("codes", "torch.float32[7, 72]")),
        ({"codes": torch.zeros(6, 72, dtype=torch.int8)}, ("bias", [7], [6])),
        (
            {"codes": torch.zeros(6, 72, dtype=torch.int8), "bias": None},
            ("weight_scale", "F32[7]", "F32[6]", "group_scale", "U8[7, 2]", "U8[6, 2]"),
        ),
        ({"bias": torch.randn(8)}, ("bias", [8], [7])),
        ({"bias": torch.full((7,), torch.nan)}, ("bias", 7)),
        ({"channel_scale": torch.zeros(72)}, ("channel_scale", 72)),
        ({"channel_scale": torch.ones(71)}, ("channel_scale", "F32[71]", "F32[72]")),
        ({"rotation": torch.full((8, 8), torch.inf)}, ("rotation", 64)),
        ({"rotation": torch.ones(8, 4)}, ("rotation", "BF16[8, 4]", "BF16[8, 8]")),
        ({"activation_clip": None}, ("activation_clip",)),
        ({"activation_bits": 16}, ("activation_clip",)),
        ({"activation_bits": 3}, ("activation_bits", 3)),
        ({"group_has_channel_scale": False}, ("channel_scale",)),
        ({"group_rotation": 4}, ("rotation", "BF16[8, 8]", "BF16[4, 4]")),
        ({"grid": fit_two_level(torch.randn(7, 72), 4, group_size=32)}, ("q", 32, 64)),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], words: tuple[object, ...]) -> None:
    with raises(ValueError, *words):
        pack_layer("q", **parts(**changes))


def test_artifact_round_trip(tmp_path: Path, block: tuple[dict[str, Tensor], dict[str, LayerSpec]]) -> None:
    path = tmp_path / "block.safetensors"
    write_block_artifact(path, *block)
    tensors, layers = read_block_artifact(path)
    assert layers == block[1]
    assert set(tensors) == set(block[0])
    for name, tensor in tensors.items():
        assert tensor.dtype == block[0][name].dtype
        assert torch.equal(tensor, block[0][name])
    assert [file.name for file in tmp_path.iterdir()] == ["block.safetensors"]


def test_same_content_gives_the_same_bytes(
    tmp_path: Path, block: tuple[dict[str, Tensor], dict[str, LayerSpec]]
) -> None:
    write_block_artifact(tmp_path / "1", *block)
    backwards = [dict(reversed(part.items())) for part in block]
    write_block_artifact(tmp_path / "2", backwards[0], backwards[1])  # type: ignore[arg-type]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_writing_what_does_not_belong_together_is_refused(
    tmp_path: Path, block: tuple[dict[str, Tensor], dict[str, LayerSpec]]
) -> None:
    tensors, layers = block
    tensors["block.v.weight_scale"] = torch.ones(3)
    tensors["block.q.weight_scale"] = tensors["block.q.weight_scale"] * 2
    del tensors["block.k.weight_packed"]
    digests = [layers[name].digest for name in ("block.q", "block.k")]
    with raises(ValueError, "block.v.weight_scale", "block.q", "block.k", *digests):
        write_block_artifact(tmp_path / "x", tensors, layers)
    with raises(ValueError, "block.k", "block.q"):
        write_block_artifact(tmp_path / "x", {}, {"block.k": layers["block.k"]})
    assert list(tmp_path.iterdir()) == []


def test_one_changed_bit_is_found(tmp_path: Path, block: tuple[dict[str, Tensor], dict[str, LayerSpec]]) -> None:
    path = tmp_path / "x"
    write_block_artifact(path, *block)
    data = bytearray(path.read_bytes())
    data[data.index(block[0]["block.k.weight_packed"].numpy().tobytes()) + 17] ^= 4
    path.write_bytes(data)
    with raises(ValueError, "block.k", "digest"):
        read_block_artifact(path)


def test_files_that_are_no_artifacts_are_refused(
    tmp_path: Path, block: tuple[dict[str, Tensor], dict[str, LayerSpec]]
) -> None:
    path = tmp_path / "x"
    write_block_artifact(path, *block)
    tensors = load_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    with raises(ValueError, path, path.stat().st_size):
        read_block_artifact(path)
    layers = {name: spec.to_dict() for name, spec in block[1].items()}
    metadata: dict[str, str]
    for metadata, words in (
        ({"format": "pt"}, ("reelquant", ["format"])),
        ({"reelquant": "{"}, ("metadata", "JSON")),
        ({"reelquant": "7"}, ("metadata", 7)),
        ({"reelquant": json.dumps({"format_version": 99, "layers": layers})}, ("format_version", 99)),
        ({"reelquant": json.dumps({"format_version": 1})}, ("layers", None)),
    ):
        save_file(tensors, path, metadata=metadata)
        with raises(ValueError, path, *words):
            read_block_artifact(path)
