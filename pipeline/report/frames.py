"""Full precision and quantized videos of a prompt side by side, and their frames as filmstrips with the difference."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.report.figure import MAP, Picture
from pipeline.report.films import Film, read_films
from pipeline.report.measurements import ModelMeasurements
from pipeline.report.run_data import RunData
from pipeline.run_units import FULL_PRECISION
from storage.recorded_outputs import DamagedArray, RecordedOutputs

NUM_FRAMES = 5
SMALL_WIDTH = 160
"""Frames up to this width are shown pixel by pixel, as PNG; wider ones shrink to `LARGE_WIDTH` and become JPEG."""
LARGE_WIDTH = 280
GAP = 4
MAX_METHODS = 6
"""Methods shown on the middle prompt, where all are shown."""

Frames = NDArray[np.uint8]
"""`[frames, height, width, 3]`."""


@dataclass(frozen=True)
class Strip:
    """One row of a comparison."""

    label: str
    detail: str
    picture: Picture


@dataclass(frozen=True)
class Video:
    """One film beside others."""

    label: str
    detail: str
    film: Film
    pixelated: bool


@dataclass(frozen=True)
class Comparison:
    """One prompt."""

    title: str
    """Why this prompt is shown."""
    prompt: str
    beside: str
    """What the prompt's file has beside it."""
    frame_numbers: tuple[int, ...]
    strips: tuple[Strip, ...]
    videos: tuple[Video, ...]
    """Full precision first; empty where the evaluation wrote no films."""


@dataclass(frozen=True)
class Comparisons:
    """All prompts that are shown, on one difference scale."""

    shown: tuple[Comparison, ...]
    largest_difference: float
    """Upper end of the difference scale, in grey levels of 255; the lower end is 0."""
    scale: Picture
    problems: tuple[str, ...]
    """Videos that cannot be read."""


def compare_frames(run: RunData, models: Sequence[ModelMeasurements]) -> Comparisons | None:
    """Worst, middle and best prompt of the run's method; on the middle one, all methods. None before any comparison."""
    by_name = {model.name: model for model in models}
    main = by_name[run.method_names[0]]
    psnr = main.values("psnr_db")
    shown: list[tuple[str, str, dict[str, Frames], tuple[int, ...]]] = []
    problems: list[str] = []
    for title, prompt, names in _choose(psnr, run.method_names):
        present = [FULL_PRECISION, *(name for name in names if prompt in by_name[name].results)]
        try:
            frames, numbers = _read(run.outputs, present, prompt)
        except DamagedArray as error:
            problems.append(str(error))
            continue
        shown.append((title, prompt, frames, numbers))
    if not shown and not problems:
        return None
    differences = [
        _difference(frames[FULL_PRECISION], other)
        for *_, frames, _ in shown
        for name, other in frames.items()
        if name != FULL_PRECISION
    ]
    largest = max([1.0, *(float(np.percentile(difference, 99.8)) for difference in differences)])
    comparisons = tuple(
        Comparison(
            title,
            str(main.results[prompt]["prompt"]),
            str(run.beside("held_out", prompt)),
            numbers,
            _strips(frames, prompt, by_name, largest=largest),
            _videos(run, frames, prompt, by_name),
        )
        for title, prompt, frames, numbers in shown
    )
    return Comparisons(comparisons, largest, _scale(), tuple(problems))


def _choose(psnr: Mapping[str, float], methods: Sequence[str]) -> list[tuple[str, str, Sequence[str]]]:
    ranked = sorted(psnr, key=lambda prompt: (psnr[prompt], prompt))
    if not ranked:
        return []
    middle = ranked[(len(ranked) - 1) // 2]
    chosen = [(f"Middle prompt by PSNR ({middle}), all methods", middle, methods[:MAX_METHODS])]
    if len(ranked) == 1:
        return [(f"The held-out prompt ({middle})", middle, methods[:MAX_METHODS])]
    if ranked[0] != middle:
        chosen.append((f"Worst prompt of {methods[0]} ({ranked[0]})", ranked[0], methods[:1]))
    else:
        chosen[0] = (f"Worst prompt of {methods[0]} ({middle}), all methods", middle, methods[:MAX_METHODS])
    return [*chosen, (f"Best prompt of {methods[0]} ({ranked[-1]})", ranked[-1], methods[:1])]


def _read(store: RecordedOutputs, models: Sequence[str], prompt: str) -> tuple[dict[str, Frames], tuple[int, ...]]:
    names = {model: f"evaluation/{model}-{prompt}/video" for model in models}
    num_frames = store.shape(names[FULL_PRECISION])[0]
    numbers = tuple(sorted({round(i * (num_frames - 1) / max(1, NUM_FRAMES - 1)) for i in range(NUM_FRAMES)}))
    return {
        model: np.concatenate([store.read(name, rows=slice(i, i + 1)).numpy() for i in numbers])
        for model, name in names.items()
    }, numbers


def _strips(
    frames: Mapping[str, Frames], prompt: str, models: Mapping[str, ModelMeasurements], *, largest: float
) -> tuple[Strip, ...]:
    strips = [Strip("full precision", "", _film(frames[FULL_PRECISION], "Full-precision frames"))]
    for name, own in frames.items():
        if name == FULL_PRECISION:
            continue
        strips.append(Strip(name, _psnr_text(models[name], prompt), _film(own, f"Frames of {name}")))
        difference = _difference(frames[FULL_PRECISION], own)
        coloured = (MAP(np.clip(difference / largest, 0, 1))[..., :3] * 255).round().astype(np.uint8)
        detail = f"mean {difference.mean():.1f} of 255"
        strips.append(Strip("difference", detail, _film(coloured, f"Difference of {name} from full precision")))
    return tuple(strips)


def _videos(
    run: RunData, frames: Mapping[str, Frames], prompt: str, models: Mapping[str, ModelMeasurements]
) -> tuple[Video, ...]:
    films = read_films(run, list(frames), prompt)
    return tuple(
        Video(
            "full precision" if film.model == FULL_PRECISION else film.model,
            _psnr_text(models[film.model], prompt),
            film,
            pixelated=frames[film.model].shape[2] <= SMALL_WIDTH,
        )
        for film in films
    )


def _psnr_text(model: ModelMeasurements, prompt: str) -> str:
    psnr = model.values("psnr_db").get(prompt)
    return "" if psnr is None else f"PSNR {psnr:.2f} dB"


def _difference(reference: Frames, other: Frames) -> NDArray[np.float32]:
    """`[frames, height, width]`: absolute difference, mean of the colour channels, in grey levels."""
    difference: NDArray[np.float32] = np.abs(reference.astype(np.float32) - other.astype(np.float32)).mean(axis=-1)
    return difference


def _film(frames: Frames, alt: str) -> Picture:
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    width, height = pictures[0].size
    small = width <= SMALL_WIDTH
    if not small:
        size = (min(width, LARGE_WIDTH), round(height * min(width, LARGE_WIDTH) / width))
        pictures = [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]
        width, height = size
    film = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
    for index, picture in enumerate(pictures):
        film.paste(picture, (index * (width + GAP), 0))
    buffer = io.BytesIO()
    if small:
        film.save(buffer, "PNG", optimize=True)
    else:
        film.save(buffer, "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(uri, alt, film.width, pixelated=small)


def _scale() -> Picture:
    ramp = (MAP(np.linspace(0, 1, 128))[None, :, :3] * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(uri, "Colours of the difference, 0 to the largest", 128)
