import hashlib
import json
import re
import struct
from typing import Any

import pytest
import torch

from reelquant.checkpoint.safetensors_file import MemoryTensor
from reelquant.checkpoint.schema import (
    FORMAT_VERSION,
    LayerSpec,
    QuantizationSpec,
    TensorInfo,
    layer_digest,
    layer_tensors,
)

LAYER: dict[str, Any] = {
    "weight_bits": 4,
    "activation_bits": 6,
    "weight_layout": "two_level",
    "group": "q",
    "channel_scale": True,
    "rotation": 8,
    "digest": "0123456789abcdef",
}


def spec_dict(**changes: Any) -> dict[str, Any]:
    layers = {"q": LAYER, "k": {**LAYER, "weight_bits": 8}}
    return (
        QuantizationSpec.from_dict(
            {"format_version": 1, "bits": "W4A6", "method": "m", "layers": layers, "calibration": {"n": [1, 2]}}
        ).to_dict()
        | changes
    )


def test_survives_json() -> None:
    values = json.loads(json.dumps(spec_dict()))
    spec = QuantizationSpec.from_dict(values)
    assert spec.to_dict() == values
    assert values["quant_method"] == "reelquant"
    assert list(values["layers"]) == ["k", "q"]
    assert spec.layers["k"].weight_bits == 8


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
def test_newer_format_is_refused_before_anything_else(version: int) -> None:
    with pytest.raises(ValueError, match=f"format_version {version} is newer than {FORMAT_VERSION}.*upgrade reelquant"):
        QuantizationSpec.from_dict({"format_version": version, "whatever": 1})


@pytest.mark.parametrize("version", [None, 0, "1", True])
def test_impossible_format_version_is_refused(version: object) -> None:
    with pytest.raises(ValueError, match=f"must be an integer from 1 to {FORMAT_VERSION}"):
        QuantizationSpec.from_dict(spec_dict(format_version=version))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "unknown keys ['surprise']"),
        ({"quant_method": "bnb"}, "quant_method is 'bnb'"),
        ({"sparse_attention": {"density": 0.0}}, "density is 0.0"),
        ({"sparse_attention": 0.2}, "sparse_attention is 0.2, not an object"),
        ({"step_protection": {"noise_above": 1.5}}, "noise_above is 1.5"),
        ({"velocity_correction": {"timesteps": [1.0], "gain": [[1.0]], "bias": []}}, "all must agree"),
        ({"layers": []}, "not an object of layer specifications"),
    ],
)
def test_strict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantizationSpec.from_dict(spec_dict(**changes))


def test_every_impossible_layer_is_named() -> None:
    bad = {
        "bits": {**LAYER, "weight_bits": 9, "activation_bits": 3},
        "layout": {**LAYER, "weight_layout": "diagonal", "rotation": 12},
        "type": {**LAYER, "weight_bits": True, "rotation": "8"},
        "keys": {"weight_bits": 4, "more": 1},
        "number": 7,
    }
    with pytest.raises(ValueError, match="quantization_config") as caught:
        QuantizationSpec.from_dict(spec_dict(layers={"q": LAYER, **bad}))
    text = str(caught.value)
    for part in (
        "bits: layer specification: weight_bits is 9; 2 to 8 are possible; activation_bits is 3",
        "layout: layer specification: weight_layout is 'diagonal'",
        "rotation is 12; 0 or a power of two",
        "type: layer specification: weight_bits is True, not of type int; rotation is '8'",
        "keys: layer specification: missing keys ['activation_bits'",
        "unknown keys ['more']",
        "number: layer specification: 7 is not an object",
    ):
        assert part in text


def test_every_impossible_group_is_named() -> None:
    bad = {
        "q": LAYER,
        "a": {**LAYER, "group": "gone"},
        "b": {**LAYER, "group": "a"},
        "c": {**LAYER, "channel_scale": False},
    }
    with pytest.raises(ValueError, match="quantization_config") as caught:
        QuantizationSpec.from_dict(spec_dict(layers=bad))
    text = str(caught.value)
    assert "a: its group's leader 'gone' is not among the layers" in text
    assert "b: its group's leader 'a' belongs to the group of 'gone'" in text
    assert "c: activation_bits, channel_scale or rotation are not those of its group's leader 'q'" in text


def test_tensors_of_leader_and_member() -> None:
    spec = LayerSpec.from_dict(LAYER)
    member = {
        "weight_packed": TensorInfo("U8", (7, 9 * 4)),
        "weight_scale": TensorInfo("F32", (7,)),
        "group_scale": TensorInfo("U8", (7, 2)),
    }
    assert layer_tensors("k", spec, in_features=72, out_features=7) == member
    assert layer_tensors("q", spec, in_features=72, out_features=7) == member | {
        "channel_scale": TensorInfo("F32", (72,)),
        "rotation": TensorInfo("BF16", (8, 8)),
        "activation_clip": TensorInfo("F32", (1,)),
    }


def test_digest_covers_names_dtypes_shapes_and_bytes_but_not_the_bias() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        memory = {suffix: MemoryTensor(tensor) for suffix, tensor in tensors.items()}
        return layer_digest((suffix, tensor.info, tensor.read_bytes()) for suffix, tensor in memory.items())

    scale, packed = torch.tensor([1.0, 2.0]), torch.tensor([[1, 2]], dtype=torch.uint8)
    base = digest(weight_scale=scale, weight_packed=packed)
    assert re.fullmatch("[0-9a-f]{16}", base)
    assert digest(weight_packed=packed, weight_scale=scale) == base
    assert digest(weight_packed=packed, weight_scale=scale, bias=scale) == base
    assert digest(weight_packed=packed, weight_scale=scale * 2) != base
    assert digest(weight_packed=packed, weight_scale=scale.view(torch.int32)) != base
    assert digest(weight_packed=packed.T.contiguous(), weight_scale=scale) != base
    assert digest(weight_packed=packed, channel_scale=scale) != base
    # What format version 1 prescribes.
    content = b"weight_packed:U8:1,2:2;\x01\x02" + b"weight_scale:F32:2:8;" + struct.pack("<2f", 1.0, 2.0)
    assert base == hashlib.sha256(content).hexdigest()[:16]
