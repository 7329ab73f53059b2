"""The report, from run directories with real arrays and records, complete, incomplete, damaged and large."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.schema import RunConfig
from pipeline.fetching import fetch_report
from pipeline.report import films, run_plots
from pipeline.report.calibration import layer_kinds, read_blocks, read_salience, sqnr_map
from pipeline.report.figure import figure_labels, figure_text, ticks
from pipeline.report.frames import compare_frames
from pipeline.report.grid import Cell, Grid, GridRow, Heading, cells, grid
from pipeline.report.measurements import ModelMeasurements, measure, measure_noise_floor, table
from pipeline.report.page import write_report_at
from pipeline.report.quantities import bytes_text, fraction_text, seconds_text, spread, spread_text
from pipeline.report.run_data import read_run
from pipeline.report.timeline import Bar, Timeline, read_timeline
from pipeline.report.usage import usage_grid
from pipeline.run_units import STAGES
from reelquant.calibration.salience import select_salient
from storage.run_directory import RunDirectory
from storage.run_prompts import KeptPrompt, KeptPrompts
from tests.errors import raises
from tests.pipeline.report_run import COMMIT, LOSS_PER_METHOD, RunMaker, RunShape
from tests.pipeline.small_run import Recorded, write_report_of

SCRIPT = "<script>alert(1)</script>"
SMALL = RunShape()


class _Page(HTMLParser):
    """Tags, texts and addresses of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self.ids: set[str] = set()
        self.videos: list[dict[str, str | None]] = []
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._hidden = tag == "style"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}
        self.videos += [dict(attrs)] if tag == "video" else []
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if not self._hidden and data.strip():
            self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.texts)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RunMaker(tmp_path_factory.mktemp("complete") / "run", SMALL).everything().directory.path


@pytest.fixture(scope="module")
def complete_page(complete: Path) -> _Page:
    return _page_of(complete)


def _page_of(path: Path) -> _Page:
    return _Page(write_report_of(path).read_text(encoding="utf-8"))


def evaluated(path: Path, shape: RunShape = SMALL, **changes: Any) -> RunMaker:
    """The checkpoints and videos alone: most of a page's time goes into the figures of what comes before."""
    run = RunMaker(path, shape)
    run.assembly()
    run.evaluation(**changes)
    return run


def test_complete_run_shows_every_section_and_the_measured_numbers(complete: Path, complete_page: _Page) -> None:
    page = complete_page
    recorded = Recorded(complete)
    for method in SMALL.methods:
        psnr = [recorded.read("evaluation", f"{method}-prompt-{i:03d}").result["psnr_db"] for i in range(3)]  # type: ignore[union-attr]
        assert f"{statistics.fmean(psnr):.2f} ± {statistics.stdev(psnr):.2f}" in page.text
        assert f"{min(psnr):.2f} (prompt-{psnr.index(min(psnr)):03d})" in page.text
        ssim = [recorded.read("evaluation", f"{method}-prompt-{i:03d}").result["ssim"] for i in range(3)]  # type: ignore[union-attr]
        assert f"{statistics.fmean(ssim):.4f} ± {statistics.stdev(ssim):.4f}" in page.text
    for shown in ("6.49 GiB", "from 23.88 GiB in 16 bits", "3.68 ×", "3 of 3 (100 %)", "0123abcd", "torch", "2.13.0"):
        assert shown in page.text
    assert "is not finished" not in page.text
    assert "fell back" not in page.text
    assert COMMIT not in page.text, "a hash takes no line of its own"
    # What is copied from the page loads: the folder's name is a string of Python.
    path = f"{complete.name}/{recorded.read('assembly', 's2q').result['checkpoint']}"  # type: ignore[union-attr]
    assert f"from_pretrained({json.dumps(path)}, dtype=torch.bfloat16)" in page.text
    figures = [address for address in page.addresses if address.startswith("data:image/svg")]
    assert len(figures) == 7  # strips, salience, its parts, losses, SQNR, Gantt chart, timeline


def test_losses_from_a_part_of_the_tokens_are_said_to_be_estimates(complete_page: _Page, tmp_path: Path) -> None:
    part = RunMaker(tmp_path / "run", replace(SMALL, tokens_per_step=0.25))
    part.distillation()
    words = "losses are estimates from 25 % of the video tokens, drawn anew in every step; those before and after are of all."
    assert _page_of(part.directory.path).text.count(words) == 1, "rtn learns nothing"
    assert "are estimates" not in complete_page.text


def test_page_is_self_contained_and_repeatable(complete: Path, complete_page: _Page) -> None:
    page = complete_page
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert not page.handlers
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    first = (complete / "report.html").read_bytes()
    assert b"url(" not in first
    assert b"@import" not in first
    assert write_report_of(complete).read_bytes() == first


def test_prompts_and_errors_are_escaped(tmp_path: Path) -> None:
    shape = replace(
        SMALL, prompts=(SCRIPT, "costs $5 or $6", "雪の中を走る狐"), held_out=('"><img src=x onerror=alert(1)>', SCRIPT)
    )
    run = RunMaker(tmp_path / "run", shape).everything(single_transformer_blocks_0=f"diverged {SCRIPT}")
    raw = write_report_of(run.directory.path).read_text(encoding="utf-8")
    page = _Page(raw)
    assert SCRIPT not in raw
    assert "<img src=x" not in raw
    assert "script" not in page.tags
    assert not page.handlers
    assert page.text.count(SCRIPT) >= 3  # calibration prompts, held-out prompts, the block that fell back
    assert "雪の中を走る狐" in page.text


def test_images_and_negative_prompts_tell_prompts_of_one_text_apart(tmp_path: Path) -> None:
    same = ("a boat",) * 3
    run = RunMaker(tmp_path / "run", replace(SMALL, prompts=same, held_out=same)).everything()
    assert "Negative prompt" not in _page_of(run.directory.path).text, "where there are none"
    first = KeptPrompt(1, {"prompt": "a boat", "image": "12"}, "photos/<b>red.png")
    second = KeptPrompt(2, {"prompt": "a boat", "image": "34", "negative_prompt": "<b>blurred"}, "photos/blue.png")
    kept = KeptPrompts("p.jsonl", (first, second, KeptPrompt(3, {"prompt": "a boat"})))
    prompts = {"calibration": kept, "held_out": kept}
    RunDirectory.open_or_create(run.directory.path, run.config.identity(), {}, prompts=prompts)
    html = write_report_of(run.directory.path).read_text()
    assert "<b>red.png" not in html
    assert "<b>blurred" not in html
    page = _Page(html)
    for text in ("Image", "photos/<b>red.png", "Negative prompt", "<b>blurred"):
        assert text in page.texts, "a cell of the held-out prompts"
    both = "image photos/blue.png, negative prompt “<b>blurred”"
    for beside in ("image photos/<b>red.png", both):
        assert beside in page.texts, "below a calibration prompt"
        assert f"“a boat”, {beside}" in page.texts, "above the frames of a held-out one"
    assert "“a boat”" in page.texts, "the third has neither"


STAGES_IN_ORDER = ("trajectories", "selection", "activations", "distillation", "assembly", "evaluation")
THERE_FROM = {
    "salience": "selection",
    "losses": "distillation",
    "layers": "distillation",
    "quality": "assembly",
    "videos": "evaluation",
}


@pytest.mark.parametrize("num_stages", range(6))
def test_sections_without_data_are_left_out(tmp_path: Path, num_stages: int) -> None:
    run = RunMaker(tmp_path / "run", SMALL)
    for stage in STAGES_IN_ORDER[:num_stages]:
        getattr(run, stage)()
    page = _page_of(run.directory.path)
    assert "This run is not finished." in page.text
    sections = {address[1:] for address in page.addresses if address.startswith("#")}
    assert sections == page.ids, "the head links to all of them, and to nothing else"
    for section, stage in THERE_FROM.items():
        assert (section in sections) == (STAGES_IN_ORDER.index(stage) < num_stages), section


def test_run_without_event_log(tmp_path: Path) -> None:
    run = RunMaker(tmp_path / "run", SMALL).everything()
    (run.directory.logs / "events.jsonl").unlink()
    page = _page_of(run.directory.path)
    assert "Gantt" not in (run.directory.path / "report.html").read_text(encoding="utf-8")
    assert "is not finished" not in page.text


def test_full_precision_videos_alone_are_no_comparison(tmp_path: Path) -> None:
    page = _page_of(evaluated(tmp_path / "run", models=["full_precision"]).directory.path)
    assert "evaluation 4 of 12" in page.text
    assert "videos" not in page.ids
    assert "3 of 3 (100 %)" in page.text


@pytest.mark.parametrize("metric", ["ssim", "psnr_db"])
def test_no_bar_reaches_above_what_can_be(metric: str) -> None:
    values = {f"prompt-{index:03d}": {metric: value} for index, value in enumerate([0.9999, 0.9, 0.999, 0.998])}
    axes = Figure().subplots()
    run_plots._strip(axes, [ModelMeasurements("rtn", values, None, None)], metric)
    [bar] = [container[2][0] for container in axes.containers]
    [[(_, low), (_, high)]] = bar.get_segments()
    mean = statistics.fmean(value[metric] for value in values.values())
    deviation = statistics.stdev(value[metric] for value in values.values())
    assert low == pytest.approx(mean - deviation)
    assert high == pytest.approx(1.0 if metric == "ssim" else mean + deviation)


def test_lpips_is_shown_if_measured(complete_page: _Page, tmp_path: Path) -> None:
    assert "LPIPS" not in complete_page.text
    page = _page_of(evaluated(tmp_path / "run", lpips=0.1234).directory.path)
    assert "LPIPS" in page.text
    assert "0.123 ± 0.000" in page.text


def test_what_is_not_measured_is_not_there(tmp_path: Path) -> None:
    path = evaluated(tmp_path / "run", replace(SMALL, recognizer=False)).directory.path
    page = _page_of(path)
    assert "Recognized" not in page.text
    read = measure(read_run(path))
    found = table((*read[:2], replace(read[2], results={}, scores={})))
    assert not any(all(cells[i].empty for _, cells in found.rows) for i in range(len(found.columns)))
    assert grid(
        [Heading("a"), Heading("b"), Heading("c")], [GridRow(cells("x", "–", "1")), GridRow(cells("y", "", "–"))]
    ) == Grid((Heading("a"), Heading("c")), (GridRow(cells("x", "1")), GridRow(cells("y", "–"))))
    assert grid([Heading("a"), Heading("b")], [GridRow(cells("x", "–"))]) is None


def test_small_films_play_in_the_page_and_large_ones_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = evaluated(tmp_path / "run", replace(SMALL, films=True)).directory.path
    page = _page_of(path)
    assert len(page.videos) == 3 + 2 + 2, (
        "full precision beside all methods on the middle prompt, beside the first on two more"
    )
    assert all({"autoplay", "muted", "loop", "playsinline", "controls"} <= video.keys() for video in page.videos)
    assert all((video["src"] or "").startswith("data:video/mp4;base64,") for video in page.videos)
    raw = (path / "report.html").read_bytes()
    film = base64.b64decode((page.videos[0]["src"] or "").partition(",")[2])
    assert film in [file.read_bytes() for file in (path / "evaluation").glob("full_precision-*.mp4")]
    assert write_report_of(path).read_bytes() == raw
    monkeypatch.setattr(films, "MAX_EMBEDDED_BYTES", 10)
    linked = [video["src"] or "" for video in _page_of(path).videos]
    assert len(linked) == 7
    assert all((path / address).is_file() for address in linked)
    copied = fetch_report(path, tmp_path)
    assert copied.name == "run-report.html"
    videos = _Page(copied.read_text(encoding="utf-8")).videos
    assert [(tmp_path / (v["src"] or "")).read_bytes() for v in videos] == [(path / a).read_bytes() for a in linked]
    Recorded(path).file(f"evaluation/{Path(linked[0]).stem}/film.mp4").unlink()
    assert [video["src"] for video in _page_of(path).videos] == linked[1:]


def test_blocks_that_fell_back_are_named_on_top(tmp_path: Path) -> None:
    run = RunMaker(tmp_path / "run", replace(SMALL, methods=("s2q",))).everything(transformer_blocks_1="loss is NaN")
    page = _page_of(run.directory.path)
    assert "1 block fell back to rounding without learning. transformer_blocks.1 (s2q): loss is NaN" in page.text
    assert page.text.index("fell back") < page.text.index("Quality, size and speed")


def _flip_a_byte_of_a_video(run: Path) -> str:
    file = next(Recorded(run).file("evaluation/s2q-prompt-002/video").glob("c*"))
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    return "Cannot be shown: calibration array 'evaluation/s2q-prompt-002/video'"


def _remove_a_video(run: Path) -> str:
    next(Recorded(run).file("evaluation/s2q-prompt-002/video").glob("c*")).unlink()
    return "Cannot be shown: calibration array 'evaluation/s2q-prompt-002/video'"


def _cut_a_record(run: Path) -> str:
    file = Recorded(run).file("assembly/s2q/any").parents[1] / "record.json"
    file.write_bytes(file.read_bytes()[:50])
    return "Damaged records, left out below."


@pytest.mark.parametrize("damage", [_flip_a_byte_of_a_video, _remove_a_video, _cut_a_record])
def test_damage_is_said_and_the_rest_is_shown(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    path = evaluated(tmp_path / "run").directory.path
    said = damage(path)
    page = _page_of(path)
    assert said in page.text
    assert "Stage times" in page.text


def test_memory_that_was_short_is_said(tmp_path: Path) -> None:
    made = RunMaker(tmp_path / "run", SMALL)
    made.trajectories()
    path = made.directory.path
    assert "ran out of memory" not in write_report_of(path).read_text()
    unit = {"stage": "distillation", "unit": "s2q-segment-000"}
    for attempt in (1, 2):
        made.event("unit_failed", attempt=attempt, error="e", will_retry=True, reason="out of memory", **unit)
    made.event("unit_finished", seconds=1.0, attempt=3, lean=True, **unit)
    assert (
        "In the stage distillation 2 attempts ran out of memory. Done with less memory and more time, with the same result: "
        "s2q-segment-000." in write_report_of(path).read_text()
    )


def test_records_of_an_older_configuration_are_left_out(tmp_path: Path) -> None:
    """`--update` to fewer methods and prompts leaves their records behind."""
    run = RunMaker(tmp_path / "run", SMALL).everything()
    config = run.config.identity()
    config["compare"], config["prompts"]["num_held_out"] = [], 2
    listed = run.directory.units()
    RunDirectory.open_or_create(run.directory.path, config, {}, update=True)
    run.event("run_started")
    listed["evaluation"] = tuple(unit for unit in listed["evaluation"] if not unit.name.endswith("prompt-002"))
    run.directory.write_units({s: [u for u in units if "rtn" not in u.name] for s, units in listed.items()})
    data = read_run(run.directory.path)
    assert {name: (len(s.records), s.num_expected) for name, s in data.stages.items()} == {
        "trajectories": (3, 3),
        "selection": (1, 1),
        "activations": (4, 4),
        "distillation": (4, 4),
        "refinement": (0, 0),
        "assembly": (1, 1),
        "evaluation": (6, 6),
    }
    page = _page_of(run.directory.path)
    assert "rtn" not in page.text
    assert "over 2 held-out prompts" in page.text


def test_salience_is_normalized_as_the_selection_does_it(complete: Path) -> None:
    salience = read_salience(read_run(complete))
    assert salience is not None
    result = Recorded(complete).read("selection", "selection").result  # type: ignore[union-attr]
    raw = {name: torch.tensor(scores).flatten() for name, scores in result["scores"].items()}
    expected = select_salient(raw["diffusion"], raw["latent"], len(salience.chosen)).tolist()
    ranked = salience.product.flatten().argsort()[::-1][: len(salience.chosen)].tolist()
    assert ranked == expected == [prompt * SMALL.num_steps + step for prompt, step in salience.chosen]
    assert all(scores.min() == 0 and scores.max() == 1 for scores in salience.maps.values())
    assert list(salience.maps)[:2] == ["diffusion", "latent"]


def test_constant_scores_are_named(tmp_path: Path) -> None:
    run = RunMaker(tmp_path / "run", SMALL)
    run.trajectories()
    flat = [[0.0] * SMALL.num_steps] * 3
    run.selection(scores={"diffusion": flat, "latent": flat, "block_input": flat, "weight_error": flat})
    assert "Constant over all candidates, so without influence: diffusion, latent" in _page_of(run.directory.path).text


def test_blocks_are_in_model_order(tmp_path: Path) -> None:
    """Records have sorted keys: `single...` before `transformer...`, and `10` before `2`."""
    shape = replace(SMALL, num_double=12, num_single=12, segment_length=24, methods=("s2q",))
    run = RunMaker(tmp_path / "run", shape)
    run.trajectories()
    run.selection()
    run.distillation()
    blocks = read_blocks(read_run(run.directory.path))["s2q"]
    assert [block.name for block in blocks] == run.blocks
    kinds = layer_kinds(blocks)
    values = sqnr_map(blocks, kinds)
    assert values.shape == (17, 24)
    assert values[kinds.index("proj_out"), 12] == blocks[12].layer_sqnr_db["proj_out"]
    assert np.isnan(values[kinds.index("proj_out"), :12]).all()


def test_frames_are_those_of_the_store_and_their_difference(complete: Path) -> None:
    data = read_run(complete)
    compared = compare_frames(data, measure(data))
    assert compared is not None
    assert [len(comparison.strips) for comparison in compared.shown] == [5, 3, 3]  # all methods on the middle prompt
    worst = compared.shown[1]
    assert "Worst" in worst.title
    unit = re.search(r"prompt-\d+", worst.title)
    assert unit is not None
    videos = [data.outputs.read(f"evaluation/{m}-{unit[0]}/video").numpy() for m in ("full_precision", "s2q")]
    width = videos[0].shape[2]
    for strip, video in zip(worst.strips[:2], videos, strict=True):
        film = _decode(strip.picture.uri)
        for index, number in enumerate(worst.frame_numbers):
            np.testing.assert_array_equal(film[:, index * (width + 4) :][:, :width], video[number])
    mean = np.abs(videos[0].astype(float) - videos[1].astype(float))[list(worst.frame_numbers)].mean()
    assert worst.strips[2].detail == f"mean {mean:.1f} of 255"


def _decode(uri: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def test_the_table_begins_with_velocities_and_ends_with_the_mean_psnr(tmp_path: Path) -> None:
    run = RunMaker(tmp_path / "run", replace(SMALL, num_steps=6)).everything()
    config = {**run.config.identity(), "evaluation": {**run.config.identity()["evaluation"], "noise_floor": True}}
    RunDirectory.open_or_create(run.directory.path, config, {}, update=True)
    run.record("evaluation", "noise_floor-velocity-000", {"prompts": {"prompt-000": {"velocity_error": [1e-5] * 6}}})
    data = read_run(run.directory.path)
    models, floor = measure(data), measure_noise_floor(data)
    found = table(models, floor, fork_db=20.0)
    assert [found.columns[0].name, found.columns[-1].name] == ["Velocity SQNR", "Mean PSNR"]
    assert "LPIPS" not in [column.name for column in found.columns], "it was not measured"
    rows = {name: dict(zip([c.name + c.unit for c in found.columns], cells, strict=True)) for name, cells in found.rows}
    assert list(rows) == ["full_precision", *SMALL.methods, "noise_floor"]
    # Errors grow from 1 to 6 times the square of 0.03: by thirds 1.5, 3.5 and 5.5 times it, 3.5 in all.
    first = rows[SMALL.methods[0]]
    sigma = LOSS_PER_METHOD[SMALL.methods[0]]
    decibels = [-10 * math.log10(factor * sigma**2) for factor in (3.5, 1.5, 3.5, 5.5)]
    assert first["Velocity SQNRdB, ↑"].text == f"{decibels[0]:.2f}"
    assert first["By thirdsearly / middle / late, dB, ↑"].text == " / ".join(f"{value:.1f}" for value in decibels[1:])
    assert first["Velocity SQNRdB, ↑"].best
    assert rows["noise_floor"]["Velocity SQNRdB, ↑"] == Cell("50.00")
    errors = [-10 * math.log10(3 * (sigma * (1 + 0.4 * index / 3)) ** 2) for index in range(3)]
    assert first["Early commitdB, ↑"].text.startswith(f"{sum(errors) / 3:.2f} ± ")
    assert first["Forksvideos, ↓"].text == "0 % [0, 56]"
    page = _page_of(run.directory.path)
    assert "noise floor" in page.text
    assert "Forks: videos below" not in page.text, "neither configured nor to be found"


def test_identical_videos_are_called_out(tmp_path: Path) -> None:
    page = _page_of(evaluated(tmp_path / "run", psnr_db=100.0, ssim=1.0).directory.path)
    assert "Every quantized video equals its full-precision one." in page.text
    assert "≥ 100 dB" in page.text


def test_one_prompt_one_method(tmp_path: Path) -> None:
    shape = replace(SMALL, held_out=("a boat",), methods=("s2q",))
    run = evaluated(tmp_path / "run", shape)
    data = read_run(run.directory.path)
    assert not any(cell.best for _, cells in table(measure(data)).rows for cell in cells)
    assert "mean ± sd, 1 held-out prompt" in _page_of(run.directory.path).text


def test_large_run_stays_small_and_readable(tmp_path: Path) -> None:
    """60 blocks, 520 layers, 40 of 500 candidates, pictures of 720p proportions with noise, the worst case for JPEG."""
    shape = RunShape(
        prompts=tuple(f"{'a long prompt ' * 12}{i}" for i in range(10)),
        held_out=tuple(f"{'a long prompt ' * 12}{i}!" for i in range(8)),
        num_steps=50, num_samples=40, num_double=20, num_single=40, segment_length=4, methods=("s2q", "gptq"),
        epochs=15, video=(5, 180, 320),
    )  # fmt: skip
    run = RunMaker(tmp_path / "run", shape).everything()
    num_bytes = write_report_of(run.directory.path).stat().st_size
    assert num_bytes < 5 * 10**6, num_bytes


def test_timeline_with_a_killed_driver_and_a_failed_attempt() -> None:
    events: list[dict[str, object]] = [
        {"time": "2026-01-01T00:00:00+00:00", "event": "run_started"},
        {"time": "2026-01-01T00:00:01+00:00", "event": "stage", "stage": "trajectories", "total": 2, "pending": 2},
        {"time": "2026-01-01T00:00:03+00:00", "event": "unit_started", "stage": "trajectories", "unit": "a", "worker": "w"},
        {"time": "2026-01-01T00:00:04+00:00", "event": "unit_failed", "stage": "trajectories", "unit": "a"},
        {"time": "2026-01-01T00:00:05+00:00", "event": "unit_started", "stage": "trajectories", "unit": "a", "worker": "w"},
        {"time": "2026-01-01T00:00:09+00:00", "event": "unit_finished", "stage": "trajectories", "unit": "a"},
        {"time": "2026-01-01T00:00:09+00:00", "event": "unit_started", "stage": "trajectories", "unit": "b", "worker": "w"},
        {"event": "of no time"},
        {"time": "2026-01-03T00:00:00+00:00", "event": "run_started"},
        {"time": "2026-01-03T00:00:00+00:00", "event": "stage", "stage": "trajectories", "total": 2, "pending": 1},
        {"time": "2026-01-03T00:00:02+00:00", "event": "unit_started", "stage": "trajectories", "unit": "b", "worker": "w"},
        {"time": "2026-01-03T00:00:06+00:00", "event": "unit_finished", "stage": "trajectories", "unit": "b"},
        {"time": "2026-01-03T00:00:06+00:00", "event": "stage", "stage": "selection", "total": 1, "pending": 0},
        {"time": "2026-01-03T00:00:07+00:00", "event": "run_finished"},
    ]  # fmt: skip
    read = read_timeline(events)
    assert [(bar.unit, bar.start_s, bar.seconds, bar.outcome) for bar in read.bars] == [
        ("a", 3, 1, "failed"),
        ("a", 5, 4, "finished"),
        ("b", 9, 0, "lost"),
        ("b", 11, 4, "finished"),
    ]
    assert read.resumed_s == (9,)
    assert read.total_s == 16
    assert read.stage_s == {"trajectories": 1 + 4 + 4}
    assert read.finished


def test_busy_shares_by_stage() -> None:
    def took(cpu_s: float, gpu_s: float | None, read_bytes: int) -> dict[str, Any]:
        return {
            "seconds": 4.0, "load_s": 1.0, "cpu_s": cpu_s, "gpu_s": gpu_s, "read_bytes": read_bytes, "written_bytes": 0,
            "disk_s": None, "network_bytes": 2**20,
        }  # fmt: skip

    bars = (
        Bar("trajectories", "a", "worker-0", 0, 5, "finished", took(4.0, 3.0, 2**30)),
        Bar("evaluation", "r", "worker-1", 0, 5, "finished", took(2.0, 1.0, 0)),
        Bar("trajectories", "b", "worker-0", 5, 5, "finished", took(2.0, None, 2**30)),
        Bar("trajectories", "c", "worker-1", 6, 3, "failed"),
    )
    read = Timeline(bars, (), 12.0, {"trajectories": 10, "evaluation": 5}, finished=True, began=None, ended=None)
    found = usage_grid(read, STAGES, threads=2)
    assert found is not None
    first, second, whole = (dict(zip(found.names, [c.text for c in row.cells], strict=True)) for row in found.rows)
    assert (first["Stage"], first["Workers"], first["CPU"], first["GPU"]) == ("trajectories", "65 %", "38 %", "75 %")
    assert (first["Read"], first["read at"], first["Written"]) == ("2.00 GiB", "256.0 MiB/s", "0 B")
    assert "Disk" not in found.names, "nobody measured it"
    assert (second["Workers"], second["Network"]) == ("50 %", "256.0 KiB/s")
    assert (whole["Stage"], whole["Workers"]) == ("whole run", "75 %")
    assert usage_grid(replace(read, bars=bars[3:]), STAGES, threads=2) is None, "a run of before says nothing of it"
    picture = run_plots.gantt(read, STAGES)
    assert picture is not None
    assert picture.alt == "Gantt chart of 4 attempts at units on 2 workers"
    assert run_plots.gantt(replace(read, bars=()), STAGES) is None


def test_quantities() -> None:
    assert [bytes_text(n) for n in (0, 1023, 6_970_000_000, 17_720_000)] == ["0 B", "1023 B", "6.49 GiB", "16.90 MiB"]
    assert [seconds_text(s) for s in (0.0051, 3.067, 42.0, 750, 18_360)] == [
        "5 ms", "3.07 s", "42.0 s", "12 min 30 s", "5 h 06 min",
    ]  # fmt: skip
    assert spread_text(spread([20.0, 22.0])) == "21.00 ± 1.41"
    assert spread_text(spread([20.0])) == "20.00"
    assert spread_text(spread([])) == "–"
    assert fraction_text(14, 16) == "14 of 16 (88 %)"


def test_figure_text_is_one_short_line_without_mathematics() -> None:
    assert figure_text("a\tcat\n for $5", 40) == r"a cat for \$5"
    assert figure_text("x" * 50, 10) == "x" * 9 + "…"
    assert figure_text("雪の中を走る狐", 40) == figure_text("قطة", 40) == figure_text("a fox 🦊", 40) == ""
    names = ["rtn", "قطة", "a" * 19, "ok $"]
    assert figure_labels(names, 18) == (["rtn", "(2)", "(3)", r"ok \$"], [("(2)", "قطة"), ("(3)", "a" * 19)])
    assert ticks(10, 40) == list(range(10))
    assert ticks(60, 30) == list(range(0, 60, 2))


def test_no_run_there(tmp_path: Path) -> None:
    with raises(ValueError, tmp_path):
        write_report_of(tmp_path)


def test_report_of_an_opened_run(tmp_path: Path, digits_model: Path) -> None:
    (tmp_path / "calibration.txt").write_text("the digit 1\n")
    (tmp_path / "held_out.txt").write_text("the digit 2\n")
    config = RunConfig.model_validate(
        {
            "run": tmp_path / "run",
            "model": digits_model,
            "prompts": {
                "calibration": tmp_path / "calibration.txt",
                "num_calibration": 1,
                "held_out": tmp_path / "held_out.txt",
                "num_held_out": 1,
            },
        }
    )
    directory = RunDirectory.open_or_create(config.run, config.identity(), {})
    report = write_report_at(directory.location)
    assert report == directory.report
    assert digits_model.name in _Page(report.read_text(encoding="utf-8")).text
