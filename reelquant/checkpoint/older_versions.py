"""Translation of older versions of the checkpoint format into the present one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reelquant.attention.sparse_spec import dense_threshold
from reelquant.noise_schedule import USUAL_STEPS, Schedule, threshold_after


def translated(values: Mapping[str, Any], schedule: Schedule) -> dict[str, Any]:
    """A `quantization_config` of any version with the keys of version 3; what is wrong with it is left to its reader.

    Version 2 counted first steps: they become those of a generation with as many steps as the calibration's had, or 50.
    """
    found = dict(values)
    if values["format_version"] >= 3:
        return found
    levels = schedule(calibration_steps(values.get("calibration")))
    sparse, protection = values.get("sparse_attention"), values.get("step_protection")
    if isinstance(sparse, Mapping) and isinstance(sparse.get("dense_steps"), int):
        residual = sparse.get("residual")
        refreshes = not isinstance(residual, Mapping) or residual.get("order") != 0
        kept = {key: value for key, value in sparse.items() if key != "dense_steps"}
        found["sparse_attention"] = {
            **kept,
            "dense_above": dense_threshold(sparse["dense_steps"], levels, refreshes=refreshes),
        }
    if isinstance(protection, Mapping) and isinstance(protection.get("num_steps"), int):
        kept = {key: value for key, value in protection.items() if key != "num_steps"}
        found["step_protection"] = {**kept, "noise_above": threshold_after(protection["num_steps"], levels)}
    return found


def calibration_steps(calibration: object) -> int:
    """Steps of the generations that calibrated a checkpoint with this provenance, or 50."""
    generation = calibration.get("generation") if isinstance(calibration, Mapping) else None
    steps = generation.get("num_inference_steps") if isinstance(generation, Mapping) else None
    return steps if isinstance(steps, int) and steps > 0 else USUAL_STEPS
