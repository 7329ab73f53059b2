"""A checkpoint that counts steps means the same steps as before."""

from __future__ import annotations

from typing import Any

import pytest

from reelquant.checkpoint.schema import FORMAT_VERSION, QuantizationSpec
from reelquant.noise_schedule import shifted_levels
from tests.errors import raises


def version_2(steps: int | None = 16, **parts: Any) -> dict[str, Any]:
    calibration = {} if steps is None else {"generation": {"num_inference_steps": steps}}
    return {"format_version": 2, "bits": "W4A6", "method": "m", "layers": {}, "calibration": calibration, **parts}


@pytest.mark.parametrize("dense_steps", [0, 1, 3, 16])
@pytest.mark.parametrize("order", [0, 2])
def test_dense_steps_and_refreshes_stay_where_they_were(dense_steps: int, order: int) -> None:
    values = {"density": 0.3, "online": True, "dense_steps": dense_steps, "interval": 4, "residual": {"order": order}}
    levels = shifted_levels(16, 3.0)
    spec = QuantizationSpec.from_dict(version_2(sparse_attention=values), schedule=lambda n: shifted_levels(n, 3.0))
    assert spec.sparse_attention is not None
    found = spec.sparse_attention.schedule(levels)
    refreshes = [order > 0 and (step - max(dense_steps - 1, 0)) % 4 == 0 for step in range(16)]
    for step, kind in enumerate(found):
        if step < dense_steps - 1 or (step < dense_steps and not order):
            assert kind == "dense"
        else:
            assert kind == ("refresh" if refreshes[step] else "sparse")


@pytest.mark.parametrize("steps", [None, 16])
def test_protected_steps_are_those_of_the_calibrations_schedule(steps: int | None) -> None:
    spec = QuantizationSpec.from_dict(version_2(steps, step_protection={"num_steps": 4, "activation_bits": 8}))
    assert spec.step_protection is not None
    levels = shifted_levels(steps or 50)
    assert [spec.step_protection.bits_at(level) for level in levels] == [8] * 4 + [None] * (len(levels) - 4)


def test_it_is_written_as_the_present_version() -> None:
    spec = QuantizationSpec.from_dict(version_2(step_protection={"num_steps": 4}))
    written = spec.to_dict()
    assert written["format_version"] == FORMAT_VERSION
    assert QuantizationSpec.from_dict(written) == spec


def test_the_present_version_counts_no_steps() -> None:
    with raises(ValueError, "step_protection", "noise_above", "num_steps"):
        QuantizationSpec.from_dict({**version_2(step_protection={"num_steps": 4}), "format_version": FORMAT_VERSION})
