"""What all parts of a configuration have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Section(BaseModel):
    """A part of a configuration: unknown keys and infinite numbers are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    ADDED: ClassVar[frozenset[str]] = frozenset()
    """Keys that older versions did not have: they are left out of a dump where they have their defaults, so that runs made
    before go on and keep their fingerprints."""

    @model_serializer(mode="wrap")
    def _leave_out_added(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        unused = {key for key in self.ADDED if getattr(self, key) == fields[key].default}
        return {key: value for key, value in dump(self).items() if key not in unused}
