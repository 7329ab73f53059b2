"""Reads a file of prompts: text with one prompt a line, or JSON lines with images and negative prompts. Imports no torch."""

from __future__ import annotations

import re
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError

from pipeline.config.json_lines import FORM, JSON_LINES, NotAnObject, is_laid_out, json_in_text, parsed
from pipeline.config.loading import ConfigError, described
from pipeline.config.section import Section
from storage.location import expand_home
from workers.images import MOST_BYTES, read_image

_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_BYTE_ORDER_MARK = "\ufeff"
"""Written by Windows editors at the beginning of a file; in the middle where files were joined."""


class PromptLine(Section):
    """A line of a file of JSON lines."""

    prompt: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    image: Annotated[str, Field(min_length=1)] | None = None
    """JPEG, PNG or WebP: its path from the file's folder, inside which it lies."""
    negative_prompt: str | None = None
    """Text of the unconditional pass of guidance; null: the pipeline's own, mostly empty."""


@dataclass(frozen=True)
class ImageFile:
    """An image file that can be read."""

    name: str
    """As the line gives it."""
    path: Path
    content: bytes
    size: tuple[int, int]
    """Width and height in pixels."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file, with what belongs to it."""

    prompt: str
    line: int
    """Its number, from 1."""
    image: ImageFile | None = None
    negative_prompt: str | None = None


def read_prompts(path: Path, num: int, key: str) -> list[Prompt]:
    """The first `num` prompts of a UTF-8 file.

    A byte order mark is dropped. Only line feeds and carriage returns end a line: form feeds and Unicode's separators of lines
    and paragraphs are part of a prompt. Empty lines are skipped.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8, or has fewer prompts; a line is no `PromptLine`, or its image cannot
            be read. All lines at once.
    """
    try:
        text = expand_home(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError([f"prompts.{key}: {path} cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"prompts.{key}: {path} is not UTF-8 (byte {error.start}: {error.reason})"]) from error
    numbered = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    lines = [(number, line) for number, raw in numbered if (line := raw.strip().strip(_BYTE_ORDER_MARK).strip())]
    where, is_json = f"prompts.{key}: {path}", path.name.casefold().endswith(JSON_LINES)
    if not lines:
        one = f"a JSON object a line, {FORM}, image only where a model takes one" if is_json else "one a line"
        raise ConfigError([f"{where} holds no prompt; write {one}"])
    if is_json:
        prompts = _of_json_lines(expand_home(path).parent, lines, num, where)
    else:
        if meant := json_in_text(lines):
            raise ConfigError(
                [
                    f"{where}, {meant}: JSON, which is taken from a file whose name ends in {JSON_LINES}, one object a line: "
                    "name it so, or write prompts without JSON"
                ]
            )
        prompts = [Prompt(line, number) for number, line in lines]
    if len(prompts) < num:
        raise ConfigError(
            [
                f"prompts.{key}: {path} holds {len(prompts)} prompts, but prompts.num_{key} is {num}: add prompts or lower it"
            ]
        )
    return prompts[:num]


def comparable(prompt: str) -> str:
    """A prompt for comparison: equal for prompts that differ in case, in white space, or in how characters are encoded."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def repeated_prompts(prompts: Iterable[tuple[str, Any, int]]) -> list[tuple[str, list[int]]]:
    """The prompts that stand more than once in a file with the same things beside them, as they stand there first, and their
    lines.

    Args:
        prompts: each with what stands beside it, such as its image (hashable), and its line.
    """
    found: dict[tuple[str, Any], tuple[str, list[int]]] = {}
    for prompt, beside, line in prompts:
        found.setdefault((comparable(prompt), beside), (prompt, []))[1].append(line)
    return [(prompt, lines) for prompt, lines in found.values() if len(lines) > 1]


def _of_json_lines(folder: Path, lines: list[tuple[int, str]], num: int, where: str) -> list[Prompt]:
    """All prompts; the images of the first `num`, of which a run takes no others."""
    prompts, problems, broken = [], [], False
    for index, (number, text) in enumerate(lines):
        try:
            line = PromptLine.model_validate(parsed(text))
            image = None if line.image is None or index >= num else _read(folder, line.image)
            prompts.append(Prompt(line.prompt, number, image, line.negative_prompt))
        except ValidationError as error:
            problems += [f"{where}, line {number}: {problem}" for problem in described(error)]
        except ValueError as error:
            broken |= isinstance(error, NotAnObject)
            problems.append(f"{where}, line {number}: {error}")
    if broken and is_laid_out(lines):
        raise ConfigError(
            [
                f"{where}: JSON that is not one object a line: write {FORM} in each line, no [ ] around and no "
                "commas between them"
            ]
        )
    if problems:
        raise ConfigError(problems)
    return prompts


def _read(folder: Path, name: str) -> ImageFile:
    """The image at the path `name` from `folder`, of which links may not lead out.

    Raises:
        ValueError: it lies elsewhere, is not there, no file, too large, or no image.
    """
    path = folder / name
    if "\0" in name:
        raise ValueError(f"image: {name!r} holds a NUL character, which is in no path")
    try:
        if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"image: {name!r} does not lie in {folder}, the file's folder: give a path inside it")
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"image: {path} is no file that holds an image, but a folder or a device")
        if found.st_size > MOST_BYTES:
            raise ValueError(
                f"image: {path} has {found.st_size} bytes, at most {MOST_BYTES} are taken: make it smaller"
            )
        content = path.read_bytes()
    except FileNotFoundError as error:
        if name.startswith("~") or _URL.match(name):
            raise ValueError(
                f"image: {name!r} is not there: only paths inside {folder}, the file's folder, are taken, no URL and no ~"
            ) from error
        raise ValueError(f"image: {path} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise ValueError(f"image: {path} cannot be read: {error.strerror}") from error
    except RuntimeError as error:  # `resolve` until Python 3.12
        raise ValueError(f"image: {path} cannot be read: its links lead in a circle") from error
    try:
        return ImageFile(name, path, content, read_image(content).size)
    except ValueError as error:
        raise ValueError(f"image: {path} {error}") from error
