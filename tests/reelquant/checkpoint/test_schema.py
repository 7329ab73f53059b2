import hashlib
import json
import re
import struct
from typing import Any

import pytest
import torch

from reelquant.checkpoint.schema import FORMAT_VERSION, QuantizationSpec
from reelquant.quantization.layer_spec import LayerSpec, TensorInfo, layer_digest, layer_tensors
from tests.errors import raises

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
    with raises(ValueError, "format_version", version, FORMAT_VERSION):
        QuantizationSpec.from_dict({"format_version": version, "whatever": 1})


@pytest.mark.parametrize("version", [None, 0, "1", True])
def test_impossible_format_version_is_refused(version: object) -> None:
    with raises(ValueError, "format_version", repr(version), FORMAT_VERSION):
        QuantizationSpec.from_dict(spec_dict(format_version=version))


MISTAKES: list[tuple[dict[str, Any], tuple[object, ...]]] = [
    ({"surprise": 1}, ("surprise",)),
    ({"quant_method": "bnb"}, ("quant_method", "bnb")),
    ({"sparse_attention": {"density": 0.0}}, ("sparse_attention", "density", 0.0)),
    ({"sparse_attention": 0.2}, ("sparse_attention", 0.2)),
    ({"step_protection": {"noise_above": 1.5}}, ("step_protection", "noise_above", 1.5)),
    ({"velocity_correction": {"timesteps": [1.0], "gain": [[1.0]], "bias": []}}, ("velocity_correction", 1, 0)),
    ({"layers": []}, ("layers", [])),
]


@pytest.mark.parametrize(("changes", "words"), MISTAKES)
def test_strict(changes: dict[str, Any], words: tuple[object, ...]) -> None:
    with raises(ValueError, "quantization_config", *words):
        QuantizationSpec.from_dict(spec_dict(**changes))


def test_every_impossible_layer_is_named() -> None:
    bad = {
        "bits": {**LAYER, "weight_bits": 9, "activation_bits": 3},
        "layout": {**LAYER, "weight_layout": "diagonal", "rotation": 12},
        "type": {**LAYER, "weight_bits": True, "rotation": "8"},
        "keys": {"weight_bits": 4, "more": 1},
        "number": 7,
    }
    with raises(
        ValueError, "quantization_config", *bad, 9, 3, "diagonal", 12, True, "'8'", "activation_bits", "more", 7
    ):
        QuantizationSpec.from_dict(spec_dict(layers={"q": LAYER, **bad}))


def test_every_impossible_group_is_named() -> None:
    bad = {
        "q": LAYER,
        "a": {**LAYER, "group": "gone"},
        "b": {**LAYER, "group": "a"},
        "c": {**LAYER, "channel_scale": False},
    }
    with raises(ValueError, "quantization_config", *bad, "'gone'", "'a'", "channel_scale", "'q'"):
        QuantizationSpec.from_dict(spec_dict(layers=bad))


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
        return layer_digest(tensors)

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
