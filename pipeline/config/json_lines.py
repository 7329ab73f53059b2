"""A file of JSON lines as text: one object a line, and what else it may be instead. Imports no torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

JSON_LINES = ".jsonl"
"""How the name of a file of JSON lines ends, in letters of either case."""
FORM = '{"prompt": "...", "image": "path/from/the/file.png"}'
"""A line of such a file, for messages."""
_MOST_SHOWN = 60
"""Characters of a line in a message."""
_SPACE = re.compile(r"\s*")


def line_numbers(numbers: Sequence[int]) -> str:
    """For messages: `line 3`, `lines 3, 5`."""
    return f"line{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def json_in_text(lines: list[tuple[int, str]]) -> str | None:
    """Which lines of a file of text are JSON with prompts."""
    if found := [number for number, line in lines if _has_prompt(_json_values(line.strip("[], \t")))]:
        return line_numbers(found)
    if _has_prompt(_json_values("\n".join(line for _, line in lines))):
        first, last = lines[0][0], lines[-1][0]
        return line_numbers([first]) if first == last else f"lines {first} to {last}"
    return None


def _has_prompt(values: list[Any]) -> bool:
    inside = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return any(isinstance(item, dict) and "prompt" in item for item in inside)


def _json_values(text: str) -> list[Any]:
    """The values of a text that is nothing but JSON, one behind the other, over any number of lines; else none."""
    decoder, values, at = json.JSONDecoder(), [], 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return []
    return values


class NotAnObject(ValueError):
    """A line is no JSON object."""


def parsed(text: str) -> dict[str, Any]:
    """The object of a line.

    Raises:
        NotAnObject: it holds something else.
        ValueError: a key stands twice.
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise NotAnObject(
            f'not JSON ({error.msg}, column {error.colno}): write {{"prompt": "..."}}, or one prompt a line into a file whose '
            f"name does not end in {JSON_LINES}"
        ) from error
    except RecursionError as error:
        raise NotAnObject(f"{_shown(text)} nests too many values: write one JSON object a line, {FORM}") from error
    if not isinstance(values, dict):
        raise NotAnObject(f"{_shown(text)} is no JSON object: write one a line, {FORM}")
    return values


def _shown(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def is_laid_out(lines: list[tuple[int, str]]) -> bool:
    """Whether the file is an array, or its objects stand in several lines, or several in one."""
    if lines[0][1] in ("{", "[", "[{"):
        return True
    values = _json_values("\n".join(line for _, line in lines))
    return len(values) not in (0, len(lines)) or (len(values) == 1 and isinstance(values[0], list))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"{', '.join(repeated)} stands twice: keep one")
    return dict(pairs)
