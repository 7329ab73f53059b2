"""Settings of a finished checkpoint that an evaluation changes: one calibration serves them all. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from pipeline.config.section import Section

SettingName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
"""Lower-case letters, digits, - and _ only: it names a folder."""


class ResidualKnobs(Section):
    """Fields of `method.attention.residual` to change; those left out stay."""

    order: Literal[0, 1, 2] | None = None
    """0 for none. Give `dense_steps` too, as they count the first refresh."""
    rank: int | None = Field(default=None, ge=1)
    """null for no projection, if it is given."""
    extrapolation: Literal["constant", "linear", "adjacent"] | None = None
    """Of the change, with order 2."""
    storage: Literal["full", "low_rank", "low_rank_int8"] | None = None
    """How residuals are kept."""
    gain: tuple[Annotated[float, Field(ge=0, le=2)], ...] | None = None
    """Factors by lag, of order 1; null for none, if it is given."""


class KnobsConfig(Section):
    """Settings of the checkpoint to change; those left out stay as the method says."""

    density: float | None = Field(default=None, gt=0, le=1)
    """Share of the attention map that a sparse step visits."""
    dense_steps: int | None = Field(default=None, ge=0)
    """First steps that run dense."""
    interval: int | None = Field(default=None, ge=1)
    """Steps from one refresh to the next, in place of refreshes given or placed."""
    refresh_steps: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Steps that refresh, ascending, in place of the interval."""
    residual: ResidualKnobs | None = None
    """Of the residual cache."""
    precision: Literal["full", "int8_16", "int8_fp8"] | None = None
    """Of attention's products."""
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
