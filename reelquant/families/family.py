"""What all model families share: the words for groups of layers and for the token grid."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

StreamName = Literal["video", "text", "joint", "conditioning"]

FAMILIES = ("hunyuan_video",)


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of one block that read the same tensor: they share one channel scale and one rotation."""

    name: str
    stream: StreamName
    """Which tokens they read: the video's, the text's, both, or the one row of the timestep embedding."""
    layers: tuple[str, ...]
    """Names inside the block, in the order in which the block calls them. The first one is the leader."""


@dataclass(frozen=True)
class OutputLayer:
    """A linear layer of a block whose output is added to the stream, times a gate that is the same for all tokens."""

    layer: str
    """Name inside the block."""
    stream: StreamName
    """Which tokens it is added to: the video's, the text's, or both."""
    gate: tuple[str, int]
    """Module inside the block whose output, a tuple, has the gate `[1, d]` at this place."""


def family_of(transformer_config: Path) -> ModuleType:
    """The family module for a transformer's `config.json`.

    Raises:
        ValueError: no family knows the architecture that the file names.
    """
    architecture = json.loads(transformer_config.read_text(encoding="utf-8")).get("_class_name")
    try:
        return family_of_architecture(architecture)
    except ValueError as error:
        raise ValueError(f"{transformer_config}: {error}") from None


@lru_cache(maxsize=16)
def family_of_architecture(architecture: object) -> ModuleType:
    """The family module for a transformer class of diffusers by its name.

    Raises:
        ValueError: no family knows it.
    """
    families = {module.ARCHITECTURE: module for module in map(load_family, FAMILIES)}
    if not isinstance(architecture, str) or architecture not in families:
        raise ValueError(f"architecture {architecture!r} is not supported; supported are {sorted(families)}")
    return families[architecture]


def load_family(name: str) -> ModuleType:
    """The module `reelquant.families.<name>`."""
    return import_module(f"reelquant.families.{name}")
