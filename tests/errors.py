"""Assertions on messages: they have the argument or key and the offending value as whole words, in any sentence.

Whole messages stand in `tests/golden/messages.txt`, where they are reviewed as text.
"""

from __future__ import annotations

import re
from typing import TypeVar

import pytest

E = TypeVar("E", bound=BaseException)


def raises(kind: type[E], word: object, *words: object) -> pytest.RaisesExc[E]:
    """Expects an error of this kind (or a child of it) whose message has all of the words."""
    return pytest.raises(kind, check=lambda error: names(str(error), word, *words))


def names(message: str, *words: object) -> bool:
    """True; an AssertionError with the message where it lacks a word: `1` is in `rank is 1`, not in `10`, `1.5` or `x1`."""
    lacking = [str(word) for word in words if not re.search(_whole(str(word)), message)]
    if lacking:
        raise AssertionError(f"{', '.join(map(repr, lacking))} not in the message: {message}")
    return True


def _whole(text: str) -> str:
    """The pattern of a text that is no part of a longer word or number."""
    before = r"(?:(?<!\w)|(?!\w))(?:(?<!\d\.)|(?!\d))"
    after = r"(?:(?!\w)|(?<!\w))(?:(?!\.\d)|(?<!\d))"
    return before + re.escape(text) + after
