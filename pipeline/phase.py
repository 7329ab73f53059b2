"""Terminal output before there are units: which long step a command is at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from pipeline.terminal import say


@contextlib.contextmanager
def phase(console: Console, description: str, *, logged: bool = True) -> Iterator[None]:
    """Says what is done inside: in a terminal beside a spinner, which is gone after; elsewhere in a line of standard error.

    Args:
        logged: whether it is said elsewhere at all.
    """
    if console.is_terminal:
        with console.status(Text(f"{description} …")):
            yield
        return
    if logged:
        say(Console(stderr=True), f"{description} …")
    yield
