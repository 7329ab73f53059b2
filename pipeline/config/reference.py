"""Reference of all keys of a run's configuration, from their declarations. Imports no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.loading import ConfigError
from pipeline.config.schema import RunConfig

_NAMES = {"integer": "whole number", "boolean": "true | false", "string": "text", "object": "section"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Key:
    """One key of the YAML."""

    name: str
    """With dots; `NAME` stands for a name of the user's, `[]` for every member of a list."""
    type: str
    """Its possible values."""
    default: str
    """As in the YAML; of a section nothing, and `required` where the key must be given."""
    meaning: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type}{self.default and '; '}{self.default}\n    {self.meaning}"


def keys(below: str = "") -> list[Key]:
    """All keys in the order in which they are declared, a section in front of its own.

    Args:
        below: a key; empty for all.

    Raises:
        ConfigError: there is no key `below`.
    """
    schema = RunConfig.model_json_schema()
    found = list(_Walk(schema["$defs"]).section(schema, "", {}))
    if not below:
        return found
    inside = [key for key in found if key.name == below or key.name.startswith((f"{below}.", f"{below}[]."))]
    if not inside:
        close = difflib.get_close_matches(below, [key.name for key in found], cutoff=0.3)
        raise ConfigError([f"there is no key {below}; near it are {', '.join(close)}; `schema` alone lists all"])
    return inside


class _Walk:
    """Goes through a JSON schema; `defs` are the declarations of its sections."""

    def __init__(self, defs: Mapping[str, Any]) -> None:
        self._defs = defs
        self._places: dict[str, str] = {}

    def section(self, declared: Mapping[str, Any], prefix: str, defaults: Mapping[str, Any]) -> Iterator[Key]:
        """The keys of a section; `defaults` are those of the section around it, which come before its own."""
        for name, key in declared["properties"].items():
            default = defaults.get(name, key.get("default"))
            place, inner = _inner(prefix + name, key)
            meaning = key.get("description") or self._defs[inner]["description"]
            # A list of what stands elsewhere already, such as `compare`, is not spelt out again.
            known = self._places.get(inner) if place.endswith("[]") else None
            shown = "required" if name in declared.get("required", ()) else f"default {_shown(default)}"
            yield Key(
                prefix + name,
                f"list of sections like `{known}`" if known else _type(key),
                "" if isinstance(default, dict) else shown,
                " ".join(meaning.split()),
            )
            if inner and not known:
                self._places[inner] = place
                yield from self.section(self._defs[inner], f"{place}.", default if isinstance(default, dict) else {})


def _inner(name: str, key: Mapping[str, Any]) -> tuple[str, str]:
    """Place and declaration of the section inside a key; an empty declaration where there is none."""
    by_name: Mapping[str, Any] = next(iter(key.get("patternProperties", {}).values()), {})
    options = [(name, key), *((name, option) for option in key.get("anyOf", ()))]
    options += [(f"{name}[]", key.get("items", {})), (f"{name}.NAME", by_name)]
    return next(((p, option["$ref"].rpartition("/")[2]) for p, option in options if "$ref" in option), (name, ""))


def _type(key: Mapping[str, Any]) -> str:
    """The possible values of a key, in words."""
    if "anyOf" in key:
        return " | ".join(map(_type, key["anyOf"]))
    if "enum" in key or "const" in key:
        return " | ".join(map(str, key.get("enum", [key.get("const")])))
    if "items" in key:
        return f"list: {_type(key['items'])}"
    if "$ref" in key:
        return "section"
    if key.get("format") == "path" or "type" not in key:
        return "path"
    bounds = " and ".join(f"{said} {key[bound]}" for bound, said in _BOUNDS.items() if bound in key)
    return f"{_NAMES.get(key['type'], key['type'])} {bounds}".strip()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
