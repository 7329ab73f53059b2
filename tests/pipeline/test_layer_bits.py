"""Bits of every layer, and the label that is derived from them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.loading import ConfigError, load_config
from pipeline.config.schema import BitsConfig
from pipeline.context import build_context
from pipeline.layer_bits import bits_label, resolve_bits
from tests.errors import raises
from tests.pipeline.small_run import ROOT

KINDS = {
    **{f"blocks.{i}.{layer}": "block" for i in range(3) for layer in ("to_q", "to_out", "proj")},
    **{f"blocks.{i}.norm.linear": "modulation" for i in range(3)},
    "refiner.to_q": "refiner",
    "embedder.linear": "embedder",
}


def label(**bits: Any) -> str:
    return bits_label(resolve_bits(BitsConfig.model_validate(bits), KINDS), KINDS)


def test_bits_that_quantize_nothing_are_refused() -> None:
    with raises(ConfigError, "bits.exceptions", 16):
        label(exceptions=[{"pattern": "*", "weight": 16, "activation": 16}])


@pytest.mark.parametrize(
    ("weight", "activation", "expected"),
    [(2, 4, "W2A4, modulation W4"), (4, 6, "W4A6"), (5, 16, "W5A16"), (8, 8, "W8A8")],
)
def test_modulation_is_named_where_it_has_other_bits(weight: int, activation: int, expected: str) -> None:
    assert label(weight=weight, activation=activation) == expected


def test_a_label_promises_no_bits_that_layers_do_not_have() -> None:
    coarse = {"modulation": {"weight": 4}, "refiner": {"weight": 2}}
    assert label(weight=8, activation=8, **coarse) == "W8A8, modulation W4"
    assert label(weight=8, activation=8, modulation={"weight": 16}) == "W8A8, modulation W16"
    exceptions: list[dict[str, Any]] = [{"pattern": "blocks.0.to_*", "weight": 8, "activation": 8}]
    assert label(activation=6, exceptions=exceptions) == "W4A6, 2 of 9 layers W8A8"
    exceptions.append({"pattern": "*.proj", "weight": 16, "activation": 16})
    assert label(activation=6, exceptions=exceptions) == "W4A6, 5 of 9 layers W16A16/W8A8"
    exceptions.append({"pattern": "blocks.2.norm.linear", "weight": 8})
    assert label(activation=6, exceptions=exceptions) == "W4A6, 5 of 9 layers W16A16/W8A8, modulation W4/W8"
    assert label(weight=2, exceptions=[{"pattern": "*", "weight": 8, "activation": 8}]) == "W8A8"


@pytest.mark.parametrize("weight", [2, 4, 8])
def test_defaults_follow_the_blocks_bits(weight: int) -> None:
    bits = resolve_bits(BitsConfig(weight=weight, activation=8), KINDS)
    assert {bits[name].weight for name, kind in KINDS.items() if kind == "block"} == {weight}
    found = {kind: bits[name] for name, kind in KINDS.items() if kind != "block"}
    assert {kind: layer.weight for kind, layer in found.items()} == {
        "modulation": max(4, weight), "refiner": max(6, weight), "embedder": 8,
    }  # fmt: skip
    assert {layer.activation for layer in found.values()} == {16}


@pytest.mark.parametrize(("weight", "expected"), [(2, "W2A8, modulation W4"), (4, "W4A8"), (8, "W8A8")])
def test_a_run_s_label_is_true_of_the_bits_that_its_workers_get(
    weight: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / "configs" / "demo.yaml", [f"bits.weight={weight}", "bits.activation=8"])
    context = build_context(config, weights=False)
    assert context.bits_label == expected
    for method in context.methods:
        inside = {name: layer for name, layer in method.bits.items() if name.startswith(context.model.blocks)}
        modulation = {layer.weight for name, layer in inside.items() if context.model.kinds[name] == "modulation"}
        others = {
            (layer.weight, layer.activation) for name, layer in inside.items() if context.model.kinds[name] == "block"
        }
        assert (modulation, others) == ({max(4, weight)}, {(weight, 8)})
