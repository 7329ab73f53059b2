"""Reads a configuration file, applies `--set key.path=value`, and turns every mistake into one readable message."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.schema import RunConfig
from storage.location import expand_home, without_credentials


class ConfigError(ValueError):
    """Something is wrong with a configuration, a prompt file or the model: the message lists all of it."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class _UniqueKeysLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the last one of two equal keys: here they are noted."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key, line = self.construct_object(key_node), key_node.start_mark.line + 1
                if key in lines:
                    self.repeated.append(f"{key} stands twice, in lines {lines[key]} and {line}: keep one")
                lines[key] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str, where: str) -> Any:
    """The plain values of a YAML text.

    Args:
        where: what the text is, in front of every message.

    Raises:
        ConfigError: a key that stands twice in one mapping; all of them.
        yaml.YAMLError: not YAML.
    """
    loader = _UniqueKeysLoader(text)
    try:
        values = loader.get_single_data()
    finally:
        loader.dispose()
    if loader.repeated:
        raise ConfigError([f"{where}: {problem}" for problem in loader.repeated])
    return values


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in `path` with `overrides` (`key.path=value`, values in YAML) applied.

    Relative paths in it are relative to the working directory.

    Raises:
        ConfigError: unreadable file, unknown key, impossible value; all of them at once.
    """
    values = read_values(path)
    if "study" in values and "run" not in values:
        raise ConfigError([f"{path} is the file of a study: use `study {path}`, or `study {path} --plan` for its plan"])
    for override in overrides:
        set_value(values, *parse_override(override), where=f"--set {override!r}")
    return parse_config(values, str(path))


def read_values(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file, not yet checked.

    Raises:
        ConfigError: unreadable, not a mapping, or a key that stands twice.
    """
    try:
        values = load_yaml(expand_home(path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: cannot be read as YAML: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: holds {type(values).__name__}, not a mapping of configuration keys"])
    return values


def parse_override(override: str) -> tuple[str, Any]:
    """`(key.path, value)` of `key.path=value`.

    Raises:
        ConfigError: no key, or a value that is not YAML.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError([f"--set {override!r}: write key.path=value, such as --set selection.num_samples=20"])
    try:
        return key, load_yaml(text, f"--set {key}")
    except yaml.YAMLError as error:
        raise ConfigError([f"--set {override!r}: the value is not YAML: {error}"]) from error


def set_value(values: dict[str, Any], key: str, value: Any, *, where: str) -> None:
    """Puts a copy of `value` at the dotted `key`; a method given by its preset's name alone becomes a mapping first.

    Args:
        where: what asked for it, in front of every message.

    Raises:
        ConfigError: the path leads through something that has no keys.
    """
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        inner = target.setdefault(parent, {})
        if isinstance(inner, str) and parent == "method":
            inner = target[parent] = {"preset": inner}
        if not isinstance(inner, dict):
            raise ConfigError([f"{where}: {parent} is {inner!r}, which has no keys inside"])
        target = inner
    target[last] = copy.deepcopy(value)


def parse_config(values: dict[str, Any], where: str) -> RunConfig:
    """A configuration from plain values; `where` stands in front of every message."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError([f"{where}: {problem}" for problem in described(error)]) from error


_WORDS = {
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys",
    "dataclass_type": "must be a mapping of keys",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
}
"""Messages of pydantic, by type, that speak of Python's types."""
_KIND = re.compile(r"constrained-[a-z]+|[a-z]+\[.*\]")
"""What pydantic adds to the place of a mistake, for a kind of value."""


def described(error: ValidationError) -> list[str]:
    """Every mistake in one line: where, what, and the value.

    Of a key that may have several kinds of values pydantic has an error for each kind. They are one mistake: what is inside,
    where a kind fits but for that.
    """
    found: dict[tuple[Any, ...], list[Any]] = {}
    for item in error.errors():
        location = item["loc"]
        kind = next((at for at, part in enumerate(location) if _KIND.fullmatch(str(part))), None)
        if kind is None:
            found[(len(found), *location)] = [item]
        else:
            found.setdefault(location[:kind], []).append({**item, "loc": (*location[:kind], *location[kind + 1 :])})
    lines = []
    for items in found.values():
        deepest = max(len(item["loc"]) for item in items)
        places: dict[tuple[Any, ...], list[Any]] = {}
        for item in items:
            if len(item["loc"]) == deepest:
                places.setdefault(item["loc"], []).append(item)
        for first, *others in places.values():
            also = "".join(f" or {item['msg'].removeprefix('Input should be ')}" for item in others)
            lines.append(_described(first, also))
    return lines


def _described(item: Any, also: str = "") -> str:
    location = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{location}: unknown key"
    message = _WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
    shown = "" if isinstance(item["input"], dict) else f" (it is {without_credentials(repr(item['input']))})"
    return f"{location}: {message}{also}{shown}"
