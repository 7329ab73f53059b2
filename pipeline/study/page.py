"""`study.html`, `results.json` and `results.csv` of a study; the page needs neither network nor script."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import pipeline.report
from pipeline.provenance import provenance
from pipeline.report.grid import Grid, GridRow, Heading, cells, grid
from pipeline.report.quantities import NOTHING, value_text
from pipeline.study import plots
from pipeline.study.results import StudyResults
from pipeline.study.tables import TABLE as TABLE
from pipeline.study.tables import study_grid
from storage.atomic_files import json_bytes
from storage.open_place import open_place

_STYLE = Path(pipeline.report.__path__[0])
PAGE, DOCUMENT = "study.html", "results.json"
"""In the study's directory, as `TABLE`."""


def write_results(results: StudyResults) -> None:
    """Writes all three files into the study's directory.

    Raises:
        OSError: they cannot be written.
    """
    place = open_place(results.study.location)
    place.put(DOCUMENT, json_bytes(results.document()))
    place.put(TABLE, results.csv().encode())
    place.put(PAGE, render(results).encode())


def render(results: StudyResults) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, _STYLE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = results.rows()
    found = provenance()
    return environment.get_template("study.html.j2").render(
        {
            "name": results.study.location.name,
            "settings": results.study.rows,
            "seeds": results.study.written.seeds,
            "reference": results.study.written.reference,
            "provenance": {"commit": (found["commit"] or "")[:12] or "not in a git checkout", "python": found["python"]}
            | found["packages"],
            "devices": results.devices,
            "failed": [(row.name, failure) for row in rows for failure in row.failures],
            "grid": study_grid(results),
            "fidelity": plots.fidelity(results, rows),
            "along_axes": plots.along_axes(results, rows),
            "prompts": _prompt_grid(results),
            "blocks": _block_grid(results),
            "videos": any(row.n for row in rows),
            "velocity": any(row.velocity is not None for row in rows),
            "fork_db": results.fork_db(),
            "overrides": [
                (setting.name, [(key, value_text(value)) for key, value in setting.overrides.items()])
                for setting in results.study.rows
            ],
        }
    )


def _prompt_grid(results: StudyResults) -> Grid | None:
    """PSNR of every video, `seed 0, prompt-003`, one column a setting that has any."""
    by_setting: list[Mapping[tuple[int, str], Any]] = [
        {
            (seed, prompt): values.get("psnr_db")
            for seed, found in results.settings[setting.name].items()
            for prompt, values in found.prompts.items()
        }
        for setting in results.study.rows
    ]
    videos = sorted({video for found in by_setting for video, value in found.items() if value is not None})
    rows = [
        (
            f"seed {seed}, {prompt}",
            [NOTHING if found.get((seed, prompt)) is None else f"{found[seed, prompt]:.2f}" for found in by_setting],
        )
        for seed, prompt in videos
    ]
    return _by_setting(results, "Video", rows)


def _block_grid(results: StudyResults) -> Grid | None:
    """Mean over seeds of every block's error, to the reference where there is one; one column a setting that has any."""
    reference = results.study.written.reference
    columns: list[dict[str, list[float]]] = []
    for setting in results.study.rows:
        values: dict[str, list[float]] = {}
        for seed, found in results.block_errors(setting.name).items():
            base = None if reference is None else results.block_errors(reference).get(seed)
            shown = found.decibels if reference is None else base and found.difference_db(base)
            for block, value in (shown or {}).items():
                values.setdefault(block, []).append(value)
        columns.append(values)
    blocks = dict.fromkeys(block for values in columns for block in values)
    rows = [
        (block, [f"{statistics.fmean(v[block]):+.2f}" if block in v else NOTHING for v in columns]) for block in blocks
    ]
    return _by_setting(results, "Block", rows)


def _by_setting(results: StudyResults, what: str, rows: Sequence[tuple[str, Sequence[str]]]) -> Grid | None:
    headings = [Heading(what, text=True), *(Heading(setting.name) for setting in results.study.rows)]
    return grid(headings, [GridRow(cells(name, *texts)) for name, texts in rows])
