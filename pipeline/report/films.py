"""Films of the evaluation for the page, which plays full precision and the methods side by side."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.run_data import RunData
from pipeline.run_units import evaluation_name
from storage.run_directory import EVALUATION, RunDirectory

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
    store = RunDirectory(run.location).store
    there = set(store.names(EVALUATION))
    films = []
    for model in models:
        unit = evaluation_name(model, prompt)
        record, file = run.record("evaluation", unit), f"{unit}.mp4"
        written = {output.path: output.num_bytes for output in record.outputs} if record is not None else {}
        num_bytes = written.get(f"{EVALUATION}/{file}")
        if num_bytes is None or file not in there:
            continue
        uri = f"{EVALUATION}/{file}"
        if num_bytes <= MAX_EMBEDDED_BYTES:
            uri = "data:video/mp4;base64," + base64.b64encode(store.read(uri)).decode()
        films.append(Film(model, uri))
    return tuple(films)
