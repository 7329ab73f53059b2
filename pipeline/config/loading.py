"""Reads a configuration file, applies `--set key.path=value`, and turns every mistake into one readable message."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.schema import RunConfig


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
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: cannot be read as YAML: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: holds {type(values).__name__}, not a mapping of configuration keys"])
    for override in overrides:
        _apply(values, override)
    return parse_config(values, str(path))


def parse_config(values: dict[str, Any], where: str) -> RunConfig:
    """A configuration from plain values; `where` stands in front of every message."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError([f"{where}: {_describe(item)}" for item in error.errors()]) from error


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


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError([f"--set {override!r}: write key.path=value, such as --set selection.num_samples=20"])
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"--set {override!r}: the value is not YAML: {error}"]) from error
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        inner = target.setdefault(parent, {})
        if isinstance(inner, str) and parent == "method":
            inner = target[parent] = {"preset": inner}
        if not isinstance(inner, dict):
            raise ConfigError([f"--set {override!r}: {parent} is {inner!r}, which has no keys inside"])
        target = inner
    target[last] = value


def _describe(item: Any) -> str:
    location = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden":
        return f"{location}: unknown key"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(item["input"], dict) else f" (it is {item['input']!r})"
    return f"{location}: {message}{shown}"
