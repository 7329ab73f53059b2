"""A study's rows as human-readable tables: Markdown for documents, rich for the terminal; the page takes the same cells."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement

from pipeline.report.grid import Grid, GridRow, Heading, cells, grid
from pipeline.report.quantities import NOTHING, estimate_text, interval_text, seconds_text, share_text
from pipeline.study.intervals import Interval
from pipeline.study.quality_scores import THIRDS
from pipeline.study.results import StudyResults
from pipeline.study.rows import FULL_PRECISION, Forks, Row, Score
from pipeline.terminal import PlainTable, new_table, say_sentence, say_table

TERMINAL_WIDTH = 120
"""Characters that the table takes at most where no terminal says how wide it is."""
_LONGEST_NAME = 40
"""Characters of a setting's name before the terminal's table folds it."""
_LONGEST_REFERENCE = 16
"""Characters of the reference's name in a heading of it."""
_BY_THIRDS = "early / middle / late, dB"
_FEWEST = 2
"""Columns that are shown however narrow the terminal is."""
_WIDEST = 1000
_WORDS = ("Setting", "failed")
_REFERENCE, _SIXTEEN_BITS = "reference", "16 bits"
"""Texts without which a column of nothing else is empty."""
TABLE = "results.csv"
"""In the study's directory: all columns, and the rows' numbers in full."""


def study_grid(results: StudyResults) -> Grid:
    """The whole table, the most important columns first: quality, the difference to the reference, and what it costs. A column
    under which no row has anything to say is left out."""
    rows = results.rows()
    texts = [_texts(results, row) for row in rows]
    headings = [Heading(name, text=name in _WORDS) for name in texts[0]]
    reference = results.study.written.reference
    lines = [GridRow(cells(*own.values()), main=row.name == reference) for row, own in zip(rows, texts, strict=True)]
    return grid(headings, lines, unsaid=(_REFERENCE, _SIXTEEN_BITS)) or Grid((headings[0],), tuple(lines))


def _texts(results: StudyResults, row: Row) -> dict[str, str]:
    """A row's texts by heading."""
    reference = results.study.written.reference
    full = row.name == FULL_PRECISION and row.setting is None
    block_error = _number(row.block_error_db, 2) if reference is None else difference_text(row.block_error_difference)

    def compared(text: str) -> str:
        return NOTHING if reference is None else _REFERENCE if row.name == reference else text

    return {
        "Setting": row.name,
        "velocity SQNR, dB": _mean_text(row.velocity),
        f"velocity SQNR, to {reference}, dB": compared(
            difference_text(row.velocity.difference if row.velocity else None)
        ),
        "density": f"{100 * row.means['effective_density']:.1f} %" if "effective_density" in row.means else NOTHING,
        "smaller": _SIXTEEN_BITS if full else NOTHING if row.compression is None else f"{row.compression:.2f}×",
        f"PSNR, to {reference}, dB": compared(estimate_text(row.typical_difference)),
        "forks": forks_text(row.forks),
        "worst 5 %, dB": _number(row.worst_db, 2),
        _block_heading(reference): block_error if reference is None else compared(block_error),
        "early commit, dB": _mean_text(row.early_commit),
        _BY_THIRDS: thirds_text(row),
        "SSIM": _number(row.means.get("ssim"), 4),
        "recognized": f"{100 * row.means['recognized']:.1f} %" if "recognized" in row.means else NOTHING,
        "distillation": seconds_text(row.distillation_seconds),
        "n": f"{row.n}" if row.n else NOTHING,
        "mean PSNR, dB": psnr_text(row),
        "failed": "; ".join(row.failures),
    }


def _block_heading(reference: str | None) -> str:
    return "block error, dB" if reference is None else f"block error, to {reference}, dB"


def psnr_text(row: Row) -> str:
    """Mean ± standard deviation of the seeds' means."""
    if row.psnr_db is None:
        return NOTHING
    return f"{row.psnr_db:.2f}" if row.psnr_db_sd is None else f"{row.psnr_db:.2f} ± {row.psnr_db_sd:.2f}"


def difference_text(difference: Interval | None) -> str:
    """Such as `+0.42 [+0.11, +0.73]`."""
    if difference is None:
        return NOTHING
    if difference.half_width is None:
        return f"{difference.mean:+.2f}"
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def forks_text(forks: Forks | None) -> str:
    """Such as `4 % [1, 9], p 0.03`; p is that of the reference having as many."""
    if forks is None:
        return NOTHING
    share = share_text(forks.share)
    return share if forks.p is None else f"{share}, p {forks.p:.2g}"


def _mean_text(score: Score | None) -> str:
    return interval_text(None if score is None else score.mean)


def thirds_text(row: Row) -> str:
    """Velocity SQNR of the thirds of the schedule, such as `23.3 / 26.4 / 23.3`."""
    found = [row.means.get(f"velocity_sqnr_db_{part}") for part in THIRDS]
    return " / ".join(_number(value, 1) for value in found) if any(value is not None for value in found) else NOTHING


def markdown_table(results: StudyResults) -> str:
    """For documents; settings in the file's order."""
    found = study_grid(results)
    lines = [_markdown_line([heading.name for heading in found.headings]), "|" + "---|" * len(found.headings)]
    return "\n".join([*lines, *(_markdown_line([cell.text for cell in row.cells]) for row in found.rows)])


def show_results(results: StudyResults, console: Console) -> None:
    """For the terminal, or `TERMINAL_WIDTH` where there is none: as many columns as fit, and a word on where the others are.
    Failures stand below the table, where they have room."""
    found = study_grid(results)
    names = [name for name in found.names if name != "failed"]
    width = console.width if console.is_terminal else TERMINAL_WIDTH
    num = len(names)
    while num > _FEWEST and _width(_table(found, num), console) > width:
        num -= 1
    table = _table(found, num)
    if not console.is_terminal:
        console.width = max(console.width, _width(table, console))
    say_table(console, table)
    if num < len(names):
        say_sentence(
            console, f"  in {TABLE} too: {'; '.join(_folded(name).replace(chr(10), ' ') for name in names[num:])}"
        )
    for row in results.rows():
        for failure in row.failures:
            say_sentence(console, ("failed", "red"), f"  {row.name}, {failure}")


def _table(found: Grid, num: int) -> PlainTable:
    """The first `num` columns."""
    table = new_table(*(_folded(name) for name in found.names[:num]))
    table.columns[0].max_width = _LONGEST_NAME
    for row in found.rows:
        table.add_row(*(cell.text for cell in row.cells[:num]))
    return table


def _folded(heading: str) -> str:
    """In two lines where it names the reference, and without the name where that is long: its row says which it is."""
    quantity, to, rest = heading.rpartition(", to ")
    if not to:
        return heading
    name = rest.removesuffix(", dB")
    return f"{quantity},\nto {name if len(name) <= _LONGEST_REFERENCE else _REFERENCE}, dB"


def _width(table: PlainTable, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum


def _markdown_line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"
