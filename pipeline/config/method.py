"""Calibration methods in a configuration: presets, and what can be changed in them. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, TypeAdapter

from reelquant.settings.recipe import PRESETS, Recipe


def _drop_measured(merged: dict[str, Any], given: dict[str, Any]) -> None:
    """Takes from `merged` the gains and places that the preset has measured for its residual, unless they are `given`, where
    the section has a residual of another order or finds the kinds of heads while generating."""
    if merged.get("head_kinds") != "online" and merged["residual"].get("order", 1) == 1:
        return
    if "gain" not in given.get("residual", {}):
        merged["residual"].pop("gain", None)
    if "refresh_steps" not in given:
        merged.pop("refresh_steps", None)


def _fill_from_preset(values: Any) -> Any:
    """A method's given values over those of its preset, which may be given by its name alone."""
    if isinstance(values, str):
        values = {"preset": values}
    if not isinstance(values, dict):
        return values
    attention = values.get("attention") or {}
    if not isinstance(attention, dict):
        raise ValueError(f"method attention is {attention!r}; give a section such as {{density: 0.25}}")
    density = attention.get("density", 1.0)
    sparse = isinstance(density, int | float) and density < 1
    preset = values.get("preset", "s2q_quantsparse" if sparse else "reelquant")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"method preset {preset!r} is unknown: one of {', '.join(PRESETS)}")
    start = PRESETS[preset].to_dict()
    merged = {**start["attention"], **attention}
    if isinstance(merged["residual"], dict):
        merged["residual"] = {**start["attention"]["residual"], **merged["residual"]}
        _drop_measured(merged, attention)
    return {**start, **values, "attention": merged}


def _to_dict(recipe: Recipe) -> dict[str, Any]:
    """Values that `_fill_from_preset` makes the recipe of again: null where the preset has something and the recipe nothing."""
    values, start = recipe.to_dict(), PRESETS[recipe.preset].to_dict()["attention"]
    merged = {**start, **values["attention"], "residual": {**start["residual"], **values["attention"]["residual"]}}
    _drop_measured(merged, values["attention"])
    attention = recipe.attention
    if merged.get("refresh_steps") is not None and attention.refresh_steps is None:
        values["attention"]["refresh_steps"] = None
    if merged["residual"].get("gain") is not None and attention.residual.gain is None:
        values["attention"]["residual"]["gain"] = None
    return values


Method = Annotated[Recipe, BeforeValidator(_fill_from_preset), PlainSerializer(_to_dict)]
"""A recipe as a configuration has it."""
_METHOD: TypeAdapter[Recipe] = TypeAdapter(Method)


def parse_method(values: Any) -> Recipe:
    """The recipe of a preset's name, or of a mapping of changes to a preset.

    Raises:
        pydantic.ValidationError: unknown keys, impossible values; all of them.
    """
    return _METHOD.validate_python(values)
