"""Settings of a finished checkpoint that an evaluation changes: one calibration serves them all. Imports no torch.

They are fields of the declarations in `reelquant.settings.attention`, each of which may be left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from pydantic import Field, StringConstraints, create_model

from pipeline.config.section import Section
from reelquant.settings.attention import Residual, SparseAttention
from reelquant.settings.declaration import Settings

SettingName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
"""Lower-case letters, digits, - and _ only: it names a folder."""


def _changes(declaration: type[Settings], *names: str) -> dict[str, Any]:
    """Fields of `declaration`, null where they are left out, for `create_model`."""
    kinds = get_type_hints(declaration, include_extras=True)

    def said(name: str) -> Callable[[dict[str, Any]], None]:
        return lambda schema: schema.update(description=declaration.meanings()[name])

    return {name: (kinds[name] | None, Field(default=None, json_schema_extra=said(name))) for name in names}


_Residual: Any = create_model(
    "_Residual", __base__=Section, **_changes(Residual, "order", "rank", "extrapolation", "storage", "gain")
)
_Attention: Any = create_model(
    "_Attention",
    __base__=Section,
    **_changes(SparseAttention, "density", "dense_steps", "interval", "refresh_steps", "precision"),
)


class KnobsConfig(_Attention):
    """Settings of the checkpoint to change; those left out stay as the method says."""

    residual: _Residual | None = None
    """Of the residual cache: fields to change; those left out stay."""
    step_protection: bool | None = None
    """Whether the method's protected steps are protected."""
    enabled: bool | None = None
    """false for dense attention throughout."""

    def knobs(self) -> dict[str, Any]:
        """What is given, as `SparseAttention.configure` takes it."""
        given: dict[str, Any] = {k: v for k, v in self.model_dump(exclude_unset=True).items() if v is not None}
        if "residual" in given:
            given["residual"] = {k: v for k, v in given["residual"].items() if v is not None or k in ("rank", "gain")}
        return given
