"""Settings of a loaded checkpoint that are changed: it is then one that was written with them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reelquant.attention.sparse_spec import dense_threshold, refresh_thresholds
from reelquant.noise_schedule import shifted_levels
from reelquant.runtime.configurable_attention import AttentionPrecision
from reelquant.settings.attention import Residual
from reelquant.settings.generation import StepProtection
from tests.errors import raises
from tests.reelquant.runtime.test_attach import SPARSE, checkpoint_with, load, outputs

TIMES = tuple(1000 * level for level in shifted_levels(8, 2.0))
PARTS = {"sparse_attention": SPARSE, "step_protection": StepProtection(0.6, 16)}


@pytest.fixture(scope="module")
def checkpoint(tiny_source: Path, tiny_artifacts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    calibration = {"generation": {"num_inference_steps": 8}}
    folder = checkpoint_with(
        tiny_source, tiny_artifacts, tmp_path_factory.mktemp("knobs"), calibration=calibration, **PARTS
    )
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def levels(steps: int = 8) -> list[float]:
    """Those of the checkpoint's own scheduler, with as many steps as the calibration's."""
    return shifted_levels(steps, 3.0)


KNOBS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"density": 0.7}, {"density": 0.7}),
    ({"dense_steps": 3}, {"dense_above": dense_threshold(3, levels(), refreshes=True)}),
    ({"dense_steps": 3, "num_steps": 20}, {"dense_above": dense_threshold(3, levels(20), refreshes=True)}),
    ({"interval": 2, "residual": {"order": 1}}, {"interval": 2, "residual": Residual(order=1, rank=4)}),
    ({"refresh_steps": [1, 5]}, {"refresh_at": refresh_thresholds([1, 5], levels())}),
    (
        {"residual": {"extrapolation": "adjacent", "rank": 2, "storage": "full"}, "dense_above": 0.95},
        {"residual": Residual(rank=2, extrapolation="adjacent", storage="full"), "dense_above": 0.95},
    ),
    ({"residual": {"order": 1, "gain": [0.8]}}, {"residual": Residual(order=1, rank=4, gain=(0.8,))}),
    ({"precision": "int8_16"}, {"precision": "int8_16"}),
]


@pytest.mark.parametrize(("knobs", "fields"), KNOBS, ids=lambda value: "-".join(value))
def test_it_is_the_checkpoint_written_so_and_is_saved_so(
    checkpoint: Path,
    knobs: dict[str, Any],
    fields: dict[str, Any],
    tiny_source: Path,
    tiny_artifacts: list[Path],
    tmp_path: Path,
) -> None:
    spec = replace(SPARSE, **fields)
    model = load(checkpoint)
    before = outputs(model, TIMES)
    model.sparse_attention.configure(**knobs)
    assert model.sparse_attention.spec == spec
    found = outputs(model, TIMES)
    written = load(checkpoint_with(tiny_source, tiny_artifacts, tmp_path, **{**PARTS, "sparse_attention": spec}))
    for a, b in zip(found, outputs(written, TIMES), strict=True):
        assert torch.equal(a, b)
    assert model.sparse_attention.visited.density == written.sparse_attention.visited.density
    assert any(not torch.equal(a, b) for a, b in zip(found, before, strict=True))
    model.save_pretrained(tmp_path / "saved" / "transformer")
    saved = load(tmp_path / "saved")
    stored = saved.hf_quantizer.quantization_config.spec
    assert (stored.sparse_attention, stored.step_protection) == (spec, PARTS["step_protection"])
    assert saved.sparse_attention.precision == AttentionPrecision(spec.precision, spec.precision)
    model.sparse_attention.restore()
    for a, b in zip(outputs(model, TIMES), before, strict=True):
        assert torch.equal(a, b)


def test_protection_and_enabled_are_switched(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    before = outputs(model)
    model.sparse_attention.configure(step_protection=False)
    plain = outputs(model)
    assert not torch.equal(plain[0], before[0])
    model.save_pretrained(tmp_path / "off" / "transformer")
    assert load(tmp_path / "off").hf_quantizer.quantization_config.spec.step_protection is None
    model.sparse_attention.configure(enabled=False, step_protection=True)
    outputs(model)
    assert model.sparse_attention.visited.density == 1
    model.sparse_attention.restore()
    assert torch.equal(outputs(model)[0], before[0])
    model.step_protection.enabled = False
    for a, b in zip(outputs(model), plain, strict=True):
        assert torch.equal(a, b)


def test_what_is_refused_changes_nothing(
    checkpoint: Path, tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path
) -> None:
    model = load(checkpoint)
    attention = model.sparse_attention
    for knobs, words in (
        ({"density": 0.7, "colour": 3}, ["colour"]),
        ({"density": 0.7, "step_protection": False, "interval": 0}, ["interval", 0]),
        ({"density": 0.7, "residual": {"rank": 13}}, ["residual.rank", 13, 12]),
        ({"density": 0.7, "dense_steps": 8}, ["dense_steps", 8]),
        ({"density": "much", "interval": None}, ["density", "much"]),
    ):
        with raises(ValueError, *words):
            attention.configure(**knobs)
        assert (attention.spec, model.step_protection.enabled) == (SPARSE, True)
        assert model.hf_quantizer.quantization_config.spec.sparse_attention == SPARSE
    unprotected = load(checkpoint_with(tiny_source, tiny_artifacts, tmp_path, sparse_attention=SPARSE))
    with raises(ValueError, "step_protection", False):
        unprotected.sparse_attention.configure(step_protection=False)


def test_a_generation_under_way_begins_anew(checkpoint: Path) -> None:
    model = load(checkpoint)
    model.sparse_attention.configure(density=0.7, step_protection=False)
    wanted = outputs(model, TIMES[3:])
    other = load(checkpoint)
    outputs(other, TIMES[:3])
    other.sparse_attention.configure(density=0.7, step_protection=False)
    for a, b in zip(outputs(other, TIMES[3:]), wanted, strict=True):
        assert torch.equal(a, b)


def test_what_is_in_effect_is_shown(checkpoint: Path) -> None:
    attention = load(checkpoint).sparse_attention
    attention.configure(density=0.7, precision="int8_fp8")
    attention.enabled = False
    shown = repr(attention)
    assert all(part in shown for part in ("enabled=False", "density=0.7", "precision='int8_fp8'", "head_kinds='"))


def test_a_copy_is_configured_apart(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    before = outputs(model, TIMES)
    twin = copy.deepcopy(model)
    twin.sparse_attention.configure(density=0.9, interval=2, step_protection=False)
    for a, b in zip(outputs(model, TIMES), before, strict=True):
        assert torch.equal(a, b)
    for name, one, density in (("model", model, SPARSE.density), ("twin", twin, 0.9)):
        one.save_pretrained(tmp_path / name / "transformer")
        spec = load(tmp_path / name).hf_quantizer.quantization_config.spec
        assert spec.sparse_attention.density == density
        assert (spec.step_protection is None) == (name == "twin")
