"""Films of the evaluation for the page, which plays full precision and the methods side by side."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.report.run_data import RunData
from pipeline.run_units import evaluation_name
from storage.recorded_outputs import DamagedArray
from storage.run_directory import EVALUATION, RunDirectory
from workers.messages import FILM

MAX_EMBEDDED_BYTES = 2**19
"""A film of at most this size is inside the page, which is then one file to send; a larger one is played from the run's folder
`evaluation/`, which has to stay beside the page."""


@dataclass(frozen=True)
class Film:
    """One model's video of a prompt."""

    model: str
    uri: str
    """A `data:` URI, or a path relative to the page."""


def read_films(run: RunData, models: Sequence[str], prompt: str) -> tuple[Film, ...]:
    """Films of one prompt, in the order of `models`; those that were not written, or were removed since, are left out."""
    films = []
    for model in models:
        unit = evaluation_name(model, prompt)
        path = _film(run, unit)
        if path is None:
            continue
        uri = f"{EVALUATION}/{unit}.mp4"
        if path.stat().st_size <= MAX_EMBEDDED_BYTES:
            uri = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
        films.append(Film(model, uri))
    return tuple(films)


def export_films(run: RunData) -> None:
    """Copies all films from the cache to `evaluation/<unit>.mp4` of the run, where people find them."""
    place = RunDirectory(run.location).place
    for record in run.stages["evaluation"].records:
        path = _film(run, record.unit)
        if path is not None:
            place.put(f"{EVALUATION}/{record.unit}.mp4", path.read_bytes())


def _film(run: RunData, unit: str) -> Path | None:
    record = run.record("evaluation", unit)
    if record is None or FILM not in {output.path for output in record.outputs}:
        return None
    try:
        return run.outputs.file(f"evaluation/{unit}/{FILM}")
    except DamagedArray:
        return None
