"""Tables of the pages: only columns under which some row has something to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.quantities import NOTHING


@dataclass(frozen=True)
class Heading:
    """Head of a column."""

    name: str
    unit: str = ""
    """Unit, direction or kind, in small print."""
    text: bool = False
    """Whether its cells are words, not numbers."""


@dataclass(frozen=True)
class Cell:
    """One cell."""

    text: str
    best: bool = False

    @property
    def empty(self) -> bool:
        """Whether it says nothing."""
        return self.text in ("", NOTHING)


@dataclass(frozen=True)
class GridRow:
    """One row; the first cell names it."""

    cells: tuple[Cell, ...]
    main: bool = False
    """Whether it is the one that matters most."""
    note: str = ""
    """Small print below its name."""


@dataclass(frozen=True)
class Grid:
    """Rows of cells, one a heading."""

    headings: tuple[Heading, ...]
    rows: tuple[GridRow, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns."""
        return tuple(heading.name for heading in self.headings)


def grid(headings: Sequence[Heading], rows: Sequence[GridRow], *, unsaid: Sequence[str] = ()) -> Grid | None:
    """The table without the columns that are empty in every row; None where nothing but the rows' names is left.

    Args:
        unsaid: texts that say nothing where they are the only ones of a column.
    """
    kept = [
        i
        for i in range(len(headings))
        if any(not row.cells[i].empty and row.cells[i].text not in unsaid for row in rows)
    ]
    if not set(kept) - {0}:
        return None
    return Grid(
        tuple(headings[i] for i in kept),
        tuple(GridRow(tuple(row.cells[i] for i in kept), row.main, row.note) for row in rows),
    )


def cells(*texts: str) -> tuple[Cell, ...]:
    """Cells of plain texts."""
    return tuple(Cell(text) for text in texts)
