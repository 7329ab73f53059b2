"""A study's rows as human-readable tables: Markdown for documents, rich for the terminal; the page takes the same cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.measure import Measurement

from pipeline.report.quantities import NOTHING, estimate_text, interval_text, seconds_text, share_text
from pipeline.study.intervals import Interval
from pipeline.study.quality_scores import THIRDS
from pipeline.study.results import StudyResults
from pipeline.study.rows import FULL_PRECISION, Forks, Row, Score
from pipeline.terminal import PlainTable, new_table, say_sentence, say_table

_BY_THIRDS = "early / middle / late, dB"
_DISPENSABLE = ("n", "distillation", "recognized", "smaller", "SSIM", "worst 5 %, dB", _BY_THIRDS, "density")
"""Columns that a narrow terminal does without, the first ones first."""
_WIDEST = 1000


def columns(results: StudyResults, rows: Sequence[Row]) -> list[str]:
    """Headings; those that no row has anything to say under are left out."""
    reference = results.study.written.reference
    blocks = any(row.block_error_db is not None for row in rows if reference in (None, row.name))
    videos = not blocks or any(row.n for row in rows)
    velocity = any(row.velocity is not None for row in rows)
    found = {
        "Setting": True,
        "n": videos,
        "density": any("effective_density" in row.means for row in rows),
        "velocity SQNR, dB": velocity,
        f"velocity SQNR, to {reference}, dB": velocity and reference is not None,
        _BY_THIRDS: velocity,
        "early commit, dB": any(row.early_commit is not None for row in rows),
        "forks": any(row.forks is not None for row in rows),
        f"PSNR, to {reference}, dB": videos and reference is not None,
        "worst 5 %, dB": videos,
        "SSIM": videos,
        "recognized": any("recognized" in row.means for row in rows),
        _block_heading(reference): blocks,
        "smaller": videos or any(row.compression is not None for row in rows),
        "distillation": True,
        "mean PSNR, dB": videos,
        "failed": any(row.failures for row in rows),
    }
    return [name for name, shown in found.items() if shown]


def cells(results: StudyResults, row: Row, rows: Sequence[Row]) -> list[str]:
    """The texts of a row, one a heading of `columns`."""
    reference = results.study.written.reference
    full = row.name == FULL_PRECISION and row.setting is None
    block_error = _number(row.block_error_db, 2) if reference is None else difference_text(row.block_error_difference)
    texts = {
        "Setting": row.name,
        "n": f"{row.n}" if row.n else NOTHING,
        "density": f"{100 * row.means['effective_density']:.1f} %" if "effective_density" in row.means else NOTHING,
        "velocity SQNR, dB": _mean_text(row.velocity),
        f"velocity SQNR, to {reference}, dB": (
            "reference" if row.name == reference else difference_text(row.velocity.difference if row.velocity else None)
        ),
        _BY_THIRDS: thirds_text(row),
        "early commit, dB": _mean_text(row.early_commit),
        "forks": forks_text(row.forks),
        f"PSNR, to {reference}, dB": "reference" if row.name == reference else estimate_text(row.typical_difference),
        "worst 5 %, dB": _number(row.worst_db, 2),
        "SSIM": _number(row.means.get("ssim"), 4),
        "recognized": f"{100 * row.means['recognized']:.1f} %" if "recognized" in row.means else NOTHING,
        _block_heading(reference): "reference" if row.name == reference else block_error,
        "smaller": "16 bits" if full else NOTHING if row.compression is None else f"{row.compression:.2f}×",
        "distillation": seconds_text(row.distillation_seconds),
        "mean PSNR, dB": psnr_text(row),
        "failed": "; ".join(row.failures),
    }
    return [texts[name] for name in columns(results, rows)]


def _block_heading(reference: str | None) -> str:
    return "block error, dB" if reference is None else f"block error, to {reference}, dB"


def psnr_text(row: Row) -> str:
    """Mean ± standard deviation of the seeds' means."""
    if row.psnr_db is None:
        return "failed" if row.failures else NOTHING
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
    rows = results.rows()
    headings = columns(results, rows)
    lines = [_markdown_line(headings), "|" + "---|" * len(headings)]
    return "\n".join([*lines, *(_markdown_line(cells(results, row, rows)) for row in rows)])


def show_results(results: StudyResults, console: Console) -> None:
    """For the terminal; failures stand below the table, where they have room. A terminal that is too narrow gets fewer columns,
    a file gets all."""
    rows = results.rows()
    headings = columns(results, rows)
    texts = [dict(zip(headings, cells(results, row, rows), strict=True)) for row in rows]
    shown = [name for name in headings if name != "failed"]
    table = _table(shown, texts)
    for dispensable in _DISPENSABLE:
        if not console.is_terminal or _width(table, console) <= console.width:
            break
        shown = [name for name in shown if name != dispensable]
        table = _table(shown, texts)
    if not console.is_terminal:
        console.width = max(console.width, _width(table, console))
    say_table(console, table)
    for row in rows:
        for failure in row.failures:
            say_sentence(console, ("failed", "red"), f"  {row.name}, {failure}")


def _table(names: Sequence[str], texts: Sequence[Mapping[str, str]]) -> PlainTable:
    table = new_table(*names)
    for row in texts:
        table.add_row(*(row[name] for name in names))
    return table


def _width(table: PlainTable, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum


def _markdown_line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"
