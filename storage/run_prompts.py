"""The prompts that a run was made with, as its `config.json` keeps them: of each file what its lines hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KeptPrompt:
    """One line of a file."""

    line: int
    """Its number, from 1."""
    content: Mapping[str, str]
    """What decides a generation: `prompt`, and `negative_prompt` and the SHA-256 of the `image` where there are."""
    image_file: str | None = None
    """As the line names it."""


@dataclass(frozen=True)
class KeptPrompts:
    """Those that a run takes of a file, in order."""

    file: str
    prompts: tuple[KeptPrompt, ...] = field(default=())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KeptPrompts:
        """Of JSON values."""
        return cls(values["file"], tuple(KeptPrompt(**prompt) for prompt in values["prompts"]))

    def differences(self, now: KeptPrompts) -> list[str]:
        """The lines of `now` that hold something else than was at their place, and what; prompts that only one has are none."""
        found = []
        for old, new in zip(self.prompts, now.prompts, strict=False):
            names = {*old.content, *new.content}
            if differing := sorted(name for name in names if old.content.get(name) != new.content.get(name)):
                found.append(f"line {new.line} ({', '.join(differing)})")
        return found


Prompts = Mapping[str, KeptPrompts]
"""By key of `prompts`."""


def prompt_differences(old: Prompts, new: Prompts) -> list[str]:
    """A line for each file whose prompts are others, or have other images; the name of an image alone is none."""
    return [
        f"prompts.{key}: in {prompts.file}, {', '.join(lines)}"
        for key, prompts in new.items()
        if key in old and (lines := old[key].differences(prompts))
    ]
