"""Reads a configuration file, applies `--set key.path=value`, and turns every mistake into one readable message."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.schema import RunConfig
from storage.location import without_credentials


class ConfigError(ValueError):
    """Something is wrong with a configuration, a prompt file or the model: the message lists all of it."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in `path` with `overrides` (`key.path=value`, values in YAML) applied.

    Relative paths in it are relative to the working directory.

    Raises:
        ConfigError: unreadable file, unknown key, impossible value; all of them at once.
    """
    values = read_values(path)
    for override in overrides:
        set_value(values, *parse_override(override), where=f"--set {override!r}")
    return parse_config(values, str(path))


def read_values(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file, not yet checked.

    Raises:
        ConfigError: unreadable, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
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
        return key, yaml.safe_load(text)
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
        raise ConfigError([f"{where}: {describe(item)}" for item in error.errors()]) from error


def read_prompts(path: Path, num: int, key: str) -> list[str]:
    """The first `num` prompts of a UTF-8 file.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8, or has fewer prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError([f"prompts.{key}: {path} cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"prompts.{key}: {path} is not UTF-8 (byte {error.start}: {error.reason})"]) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError([f"prompts.{key}: {path} holds no prompt; write one a line"])
    if len(prompts) < num:
        raise ConfigError(
            [
                f"prompts.{key}: {path} holds {len(prompts)} prompts, but prompts.num_{key} is {num}: add prompts or lower it"
            ]
        )
    return prompts[:num]


def describe(item: Any) -> str:
    """One of pydantic's errors (`ValidationError.errors()`) in one line: where, what, and the value."""
    location = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden":
        return f"{location}: unknown key"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(item["input"], dict) else f" (it is {without_credentials(repr(item['input']))})"
    return f"{location}: {message}{shown}"
