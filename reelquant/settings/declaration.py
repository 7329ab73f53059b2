"""Declarations of all settings that more than one part of the system reads. Imports no torch.

Each is declared here once, in a frozen dataclass with its default, its meaning and its possible values: the YAML of a run is
validated against it (pydantic takes it as it is), messages to workers carry it, and a checkpoint stores it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bounds:
    """Range of a number, in `Annotated`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """The bounds that there are, by name."""
        return {name: bound for name, bound in vars(self).items() if bound is not None}

    def hold(self, value: float) -> bool:
        """Whether a number is inside; NaN never is."""
        return all(
            {"ge": value >= bound, "gt": value > bound, "le": value <= bound}[name]
            for name, bound in self.given.items()
        )

    def __str__(self) -> str:
        words = {"ge": "at least", "gt": "above", "le": "at most"}
        return " and ".join(f"{words[name]} {bound:g}" for name, bound in self.given.items())

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        return {**handler(source), **self.given}


class Settings:
    """Base of the declarations: a frozen dataclass whose fields are documented by the string under each."""

    ADDED: ClassVar[frozenset[str]] = frozenset()
    """Fields that older versions did not have: they are not stored where they have their defaults, so that runs and checkpoints
    made before are the same as ever."""
    NEEDED: ClassVar[frozenset[str]] = frozenset()
    """Fields that stored values must have."""
    SECTION: ClassVar[str] = "settings"
    """Name of stored values in messages."""
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "allow_inf_nan": False,
    }

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> Any:
        """With the meaning of inherited fields too: pydantic reads the strings of the class itself."""
        found = handler(schema)
        fields_of = handler.resolve_ref_schema(found)["properties"]
        for name, meaning in cls.meanings().items():
            fields_of[name].setdefault("description", meaning)
        return found

    @classmethod
    @cache
    def meanings(cls) -> dict[str, str]:
        """The strings under the fields, inherited ones too, by name."""
        bases = [base for base in cls.__mro__ if base is not Settings and issubclass(base, Settings)]
        return {name: meaning for base in reversed(bases) for name, meaning in _meanings(base).items()}

    def impossible_values(self, prefix: str = "") -> list[str]:
        """Fields whose values are not of their declared kind, one sentence each; `prefix` stands before their names."""
        found = []
        for name, kind in self._kinds().items():
            value = getattr(self, name)
            if isinstance(value, Settings):
                found += value.impossible_values(f"{prefix}{name}.")
            elif not fits(value, kind):
                found.append(f"{prefix}{name} is {_plain(value)!r}; {said(kind)}")
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the JSON values of `to_dict`; a field left out has its default.

        Raises:
            ValueError: unknown or missing keys, or impossible values; all of them.
        """
        keys = {"unknown": list(cls._unknown(values)), "missing": sorted(cls.NEEDED - set(values))}
        problems = [f"{what} keys {', '.join(names)}" for what, names in keys.items() if names]
        found = None if problems else cls._from_known(values)
        if found is None or (problems := found.impossible_values()):
            raise ValueError(f"{cls.SECTION}: {'; '.join(problems)}")
        return found

    @classmethod
    def _from_known(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{name: _parsed(value, cls._kinds()[name]) for name, value in values.items()})

    @classmethod
    def _unknown(cls, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in values.items():
            kind = cls._kinds().get(name)
            if kind is None:
                yield f"{prefix}{name}"
            elif _is_section(kind) and isinstance(value, Mapping):
                yield from kind._unknown(value, f"{prefix}{name}.")

    @classmethod
    @cache
    def _kinds(cls) -> dict[str, Any]:
        hints = get_type_hints(cls, include_extras=True)
        return {f.name: hints[f.name] for f in fields(cls)}  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the fields; without those of `ADDED` that have their defaults."""
        return {
            f.name: _plain(getattr(self, f.name))
            for f in fields(self)  # type: ignore[arg-type]
            if not (f.name in self.ADDED and getattr(self, f.name) == f.default)
        }


def _meanings(declaration: type) -> dict[str, str]:
    """The strings under the fields that a class declares itself."""
    [body] = [node.body for node in ast.parse(inspect.getsource(declaration)).body if isinstance(node, ast.ClassDef)]
    return {
        declared.target.id: inspect.cleandoc(said.value.value)
        for declared, said in pairwise(body)
        if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name)
        if isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant) and isinstance(said.value.value, str)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


def _parsed(value: Any, kind: Any) -> Any:
    if _is_section(kind) and isinstance(value, Mapping):
        return kind._from_known(value)
    return tuple(value) if isinstance(value, list) else value


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a declared kind, bounds and members of lists included."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [part for part in parts[1:] if isinstance(part, Bounds)]
        return fits(value, parts[0]) and all(bound.hold(value) for bound in bounds)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, parts[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def said(kind: Any) -> str:
    """A declared kind in words, such as `above 0 and at most 1` or `one of full, low_rank`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return ", ".join(str(part) for part in parts[1:])
    if origin in (Union, UnionType):
        return ", or ".join(said(part) for part in parts)
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if origin is tuple:
        return f"a list, each {said(parts[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(kind) or "an object"
