"""Terminal output. Text is printed as it is: prompts, paths and error messages may hold what rich takes for markup.

Everything that the program prints goes through this module: styles are given beside a text, never inside it.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

Part = str | tuple[str, str]
"""A text, or a text with its style."""


def say(console: Console, *parts: Part) -> None:
    """Prints one line, which is never wrapped: it may be a path or a command to be copied."""
    console.print(Text.assemble(*parts), soft_wrap=True)


def say_sentence(console: Console, *parts: Part) -> None:
    """Prints a long line: wrapped between words in a terminal, left whole in a file, where it can be searched."""
    console.print(Text.assemble(*parts), soft_wrap=not console.is_terminal)


def say_table(console: Console, table: PlainTable) -> None:
    """Prints a table."""
    console.print(table)


class PlainTable(Table):
    """A table whose cells are shown as they are."""

    def add_row(self, *renderables: RenderableType | None, **options: Any) -> None:
        """As rich's, without markup in the cells."""
        cells = [Text(cell) if isinstance(cell, str) else cell for cell in renderables]
        super().add_row(*cells, **options)


def new_table(*columns: str, left: int = 1) -> PlainTable:
    """An empty table; the first `left` columns are aligned to the left, numbers to the right."""
    table = PlainTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        # Names are folded where the terminal is too narrow, numbers never cut.
        heading = Text(column)
        table.add_column(heading, justify="left" if index < left else "right", no_wrap=index > 0, overflow="fold")
    return table


def counted(num: float, noun: str) -> str:
    """`1 unit`, `3 units`, `0.5 GPUs`."""
    return f"{num:,g} {noun}" if num == 1 else f"{num:,g} {noun}s"


def human_bytes(num: float) -> str:
    """`6.11 GiB`: binary units, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num < 1000 or unit == "TiB":
            break
        num /= 1024
    digits = 0 if unit == "B" else max(0, 2 - (num >= 10) - (num >= 100))
    return f"{num:.{digits}f} {unit}"
