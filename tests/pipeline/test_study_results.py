"""A study's numbers from values small enough to check by hand, and the tables that show them."""

import csv
import io
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import mpmath
import pytest
import yaml
from rich.console import Console

from pipeline.study.block_errors import BlockErrors
from pipeline.study.expansion import load_study
from pipeline.study.intervals import mean_interval, t_cdf, t_quantile
from pipeline.study.page import render
from pipeline.study.results import StudyResults
from pipeline.study.rows import FULL_PRECISION, NOISE_FLOOR, SeedResult
from pipeline.study.tables import TERMINAL_WIDTH, markdown_table, show_results, study_grid
from tests.errors import raises

REFERENCE, OTHER, BROKEN = "a | b <i>", "interval 3", "interval 5"
QUANTILES = {1: math.tan(0.475 * math.pi), 4: 2.7764451051977934}
"""0.975 of Student's distribution, by degrees of freedom: Cauchy's, and by SciPy."""
PSNR = {
    REFERENCE: {0: [20.0, 30.0], 1: [24.0, 28.0]},
    OTHER: {0: [21.0, 32.0], 1: [24.0, 31.0]},
}
LOSSES = {
    REFERENCE: {0: [1.0, 1e-3], 1: [1e-1, 1e-2]},
    OTHER: {0: [10.0, 1e-2], 1: [1.0, 1e-3]},
}


@pytest.fixture
def results(tmp_path: Path) -> StudyResults:
    return made(tmp_path)


def made(tmp_path: Path, reference: str = REFERENCE) -> StudyResults:
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({"model": "m", "prompts": {"calibration": "c", "held_out": "h"}})
    )
    settings = [
        {"name": reference, "set": {"bits": {"weight": 5, "activation": 7}}},
        {"name": "interval {selection.num_samples}", "axes": {"selection.num_samples": [3, 5]}},
    ]
    document = {"study": str(tmp_path / "s"), "config": str(tmp_path / "base.yaml"), "seeds": [0, 1]}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**document, "reference": reference, "settings": settings}))

    def seed(name: str, number: int) -> SeedResult:
        prompts = {
            f"prompt-{index:03d}": {"psnr_db": value, "ssim": 0.5, "recognized": index == 0, "effective_density": 0.25}
            for index, value in enumerate(PSNR[name][number])
        }
        losses = {f"blocks.{index}": loss for index, loss in enumerate(LOSSES[name][number])}
        errors = BlockErrors(losses, f"samples of seed {number}")
        return SeedResult(f"seed-{number}/x", None, prompts, 1000, 3.5, 10.0 + number, errors, ("cpu",))

    names = {REFERENCE: reference, OTHER: OTHER}
    found = {names[name]: {number: seed(name, number) for number in (0, 1)} for name in PSNR}
    found[BROKEN] = {number: SeedResult(f"seed-{number}/y", "distillation/u: diverged") for number in (0, 1)}
    full = {number: {"prompt-000": {"recognized": True, "seconds_per_step": 2.0}} for number in (0, 1)}
    floor = {number: {"prompt-000": {"psnr_db": 50.0 + number, "ssim": 0.99}} for number in (0, 1)}
    return StudyResults(load_study(path), found, full, floor, ("cpu",))


def exact_t_cdf(t: float, degrees: int) -> float:
    """Student's distribution for t >= 0 in 40 digits, from the incomplete beta function."""
    with mpmath.workdps(40):
        x = degrees / (degrees + mpmath.mpf(t) ** 2)
        return float(1 - mpmath.betainc(mpmath.mpf(degrees) / 2, 0.5, 0, x, regularized=True) / 2)


def test_quantiles_of_the_distribution() -> None:
    for degrees in (1, 2, 3, 4, 7, 30, 47, 143):
        for probability in (0.6, 0.975, 0.999):
            # A tail's relative error is as large as that of t, or larger.
            assert 1 - exact_t_cdf(t_quantile(probability, degrees), degrees) == pytest.approx(
                1 - probability, rel=1e-11
            )
        assert t_cdf(1.3, degrees) == pytest.approx(exact_t_cdf(1.3, degrees), rel=1e-12)
    for degrees, expected in QUANTILES.items():
        assert t_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-11)
    with raises(ValueError, "degrees", 0):
        t_quantile(0.9, 0)


def test_interval() -> None:
    values = [1.0, 2.0, 0.0, 3.0, 7.0]
    interval = mean_interval(values)
    assert interval is not None
    mean, half = statistics.fmean(values), QUANTILES[4] * statistics.stdev(values) / math.sqrt(5)
    assert [interval.low, interval.high] == pytest.approx([mean - half, mean + half])
    assert mean_interval([]) is None
    single = mean_interval([4.0])
    assert single is not None
    assert (single.mean, single.low, single.high) == (4.0, None, None)


def test_rows(results: StudyResults) -> None:
    rows = {row.name: row for row in results.rows()}
    assert list(rows) == [REFERENCE, OTHER, BROKEN, FULL_PRECISION, NOISE_FLOOR]
    other = rows[OTHER]
    assert (other.n, other.psnr_db) == (4, 27.0)
    assert other.psnr_db_sd == pytest.approx(statistics.stdev([26.5, 27.5]))
    assert other.worst_db == 21.0
    assert other.psnr is not None
    assert other.psnr.difference is not None
    assert other.psnr.difference.mean == pytest.approx(statistics.fmean([1, 2, 0, 3]))
    # Mean squares: calibrations 0, videos 4, rest 1; of four values, with the one degree of freedom of two videos.
    assert other.psnr.difference.half_width == pytest.approx(QUANTILES[1] * math.sqrt(4 / 4))
    assert dict(other.means) == {"ssim": 0.5, "recognized": 0.5, "effective_density": 0.25}
    assert (other.compression, other.distillation_seconds) == (3.5, 10.5)
    reference = rows[REFERENCE].psnr
    assert reference is not None
    assert reference.difference is None
    assert (rows[BROKEN].n, rows[BROKEN].psnr_db, len(rows[BROKEN].failures)) == (0, None, 2)
    assert rows[NOISE_FLOOR].psnr_db == 50.5
    assert other.block_error_db == pytest.approx(-10.0)
    assert other.block_error_difference is not None
    # Seeds differ by 10 and 0 dB.
    assert other.block_error_difference.mean == pytest.approx(5.0)
    assert other.block_error_difference.half_width == pytest.approx(QUANTILES[1] * 5.0)
    assert rows[REFERENCE].block_error_difference is None
    assert rows[BROKEN].block_error_db is None


def test_velocities_are_compared_over_videos_and_calibrations(results: StudyResults) -> None:
    values = {REFERENCE: {0: [20.0, 21.0], 1: [20.4, 21.4]}, OTHER: {0: [22.0, 22.9], 1: [22.6, 23.5]}}
    settings = {
        name: {
            seed: replace(
                found,
                prompts={
                    prompt: {
                        **found.prompts[prompt],
                        "velocity_sqnr_db": value,
                        "velocity_sqnr_db_early": value - 1,
                        "velocity_sqnr_db_middle": value,
                        "velocity_sqnr_db_late": value + 2,
                        "early_commit_db": 2 * value,
                    }
                    for prompt, value in zip(found.prompts, values[name][seed], strict=True)
                }
                if name in values
                else {},
            )
            for seed, found in seeds.items()
        }
        for name, seeds in results.settings.items()
    }
    floor = {0: {"prompt-000": {"psnr_db": 50.0, "velocity_sqnr_db": 45.0}}}
    found = replace(results, settings=settings, noise_floor=floor)
    rows = {row.name: row for row in found.rows()}
    velocity = rows[OTHER].velocity
    assert velocity is not None
    assert velocity.mean.mean == pytest.approx(22.75)
    assert velocity.seed_means == {0: pytest.approx(22.45), 1: pytest.approx(23.05)}
    # Differences 2.0, 1.9 and 2.2, 2.1: calibrations differ by 0.2, videos by 0.1, and nothing is left.
    squares = 2 * 2 * 0.1**2, 2 * 2 * 0.05**2
    degrees = int(sum(squares) ** 2 / sum(square**2 for square in squares))
    assert velocity.difference is not None
    assert velocity.difference.mean == pytest.approx(2.05)
    expected = QUANTILES[degrees] * math.sqrt(sum(squares) / 4)
    assert velocity.difference.half_width == pytest.approx(expected)
    early = rows[OTHER].early_commit
    assert early is not None
    assert early.mean.mean == pytest.approx(45.5)
    heads, _, *lines = (line.split(" | ") for line in markdown_table(found).splitlines())
    cells = dict(zip(heads, lines[1], strict=True))
    assert cells["velocity SQNR, to a \\| b <i>, dB"].startswith("+2.05 [")
    assert cells["early / middle / late, dB"] == "21.8 / 22.8 / 24.8"
    assert dict(zip(heads, lines[-1], strict=True))["velocity SQNR, dB"] == "45.00"
    flat = {row["setting"]: row for row in csv.DictReader(io.StringIO(found.csv()))}
    assert float(flat[OTHER]["velocity_sqnr_db_difference"]) == pytest.approx(2.05)
    assert float(flat[OTHER]["velocity_sqnr_db_late"]) == pytest.approx(24.75)
    assert "velocity SQNR of 2 settings" in render(found)


def test_forks_are_counted_below_the_valley(results: StudyResults) -> None:
    psnr = {REFERENCE: [40.0, 41.0, 39.5, 42.0, 38.0, 40.5], OTHER: [21.0, 22.0, 20.5, 39.0, 38.5, 41.0]}
    settings = {
        name: {
            0: SeedResult("x", None, {f"prompt-{i}": {"psnr_db": value} for i, value in enumerate(psnr.get(name, []))})
        }
        for name in results.settings
    }
    found = replace(results, settings=settings)
    threshold = found.fork_db()
    assert threshold is not None
    assert 22 < threshold < 38
    rows = {row.name: row for row in found.rows()}
    forks = rows[OTHER].forks
    assert forks is not None
    assert (forks.share.value, forks.share.num, forks.p) == (0.5, 6, 0.25)
    none = rows[REFERENCE].forks
    assert none is not None
    assert (none.share.value, none.p) == (0.0, None)
    typical = rows[OTHER].typical_difference
    assert typical is not None
    assert typical.num == 6
    assert typical.low is not None
    assert "| 50 % [19, 81], p 0.25 |" in markdown_table(found)
    assert json.loads(json.dumps(found.document()))["fork_db"] == threshold


def test_files(results: StudyResults) -> None:
    rows = {row["setting"]: row for row in csv.DictReader(io.StringIO(results.csv()))}
    assert rows[OTHER]["selection.num_samples"] == "3"
    assert rows[OTHER]["effective_density"] == "0.25"
    assert rows[BROKEN]["failed"] == "seed 0: distillation/u: diverged; seed 1: distillation/u: diverged"
    assert rows[BROKEN]["psnr_db"] == rows[BROKEN]["block_error_difference_db"] == ""
    assert float(rows[OTHER]["block_error_difference_db"]) == pytest.approx(5.0)
    assert float(rows[OTHER]["block_error_difference_db_low"]) == pytest.approx(5 - 5 * QUANTILES[1])
    document = json.loads(json.dumps(results.document(), allow_nan=False))
    assert document["settings"][1]["seeds"]["1"]["prompts"]["prompt-001"]["psnr_db"] == 31.0
    assert document["settings"][1]["seeds"]["1"]["block_errors"] == {
        "losses": {"blocks.0": 1.0, "blocks.1": 0.001}, "basis": "samples of seed 1"
    }  # fmt: skip
    assert document["settings"][2]["seeds"]["1"]["block_errors"] is None
    assert [row["setting"] for row in document["table"]] == list(rows)


def test_tables(results: StudyResults) -> None:
    lines = markdown_table(results).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert lines[2].startswith("| a \\| b <i> | 25.0 % | 3.50× | reference | 20.00 |")
    assert lines[2].endswith("| 10.5 s | 4 | 25.50 ± 0.71 |  |")
    assert "| 25.0 % | 3.50× | +1.50 |" in lines[3], "of two videos, too few for an interval"
    assert "| block error, to a \\| b <i>, dB |" in lines[0]
    assert "| +5.00 [-58.53, +68.53] |" in lines[3]
    assert "seed 0: distillation/u: diverged" in lines[4]
    for width, terminal in ((500, False), (60, False), (80, True), (500, True)):
        console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
        show_results(results, console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "+1.50" in text
        whole = terminal and width == 500
        assert ("10.5 s" in text) == whole, "columns that do not fit are named"
        assert ("results.csv too: " in text) != whole
        assert max(map(len, text.splitlines())) <= (width if terminal else TERMINAL_WIDTH)
        assert "diverged" in text


def test_columns_answer_first_and_none_is_empty(results: StudyResults) -> None:
    settings = {
        name: {
            seed: replace(
                found,
                prompts={p: {**values, "velocity_sqnr_db": 20.0 + seed} for p, values in found.prompts.items()},
                distillation_seconds=None,
            )
            for seed, found in seeds.items()
        }
        for name, seeds in results.settings.items()
    }
    names = study_grid(replace(results, settings=settings)).names
    assert names[:5] == ("Setting", "velocity SQNR, dB", f"velocity SQNR, to {REFERENCE}, dB", "density", "smaller")
    assert {"distillation", "early commit, dB", "forks", "early / middle / late, dB"}.isdisjoint(names)
    settings[OTHER] = settings[BROKEN]
    alone = study_grid(replace(results, settings=settings)).names
    assert not any(", to " in name for name in alone), "there is nothing to compare with the reference"


def test_without_videos_the_table_is_that_of_the_block_errors(results: StudyResults) -> None:
    early = {
        name: {
            number: replace(found, prompts={}, transformer_bytes=None, compression=None)
            for number, found in seeds.items()
        }
        for name, seeds in results.settings.items()
    }
    lines = markdown_table(replace(results, settings=early, full_precision={}, noise_floor={})).splitlines()
    assert lines[0] == "| Setting | block error, to a \\| b <i>, dB | distillation | failed |"
    assert lines[2] == "| a \\| b <i> | reference | 10.5 s |  |"
    assert lines[3] == "| interval 3 | +5.00 [-58.53, +68.53] | 10.5 s |  |"
    assert lines[4].startswith("| interval 5 | – | ")
    unmeasured = {number: replace(found, block_errors=None) for number, found in results.settings[REFERENCE].items()}
    found = replace(results, settings={**results.settings, REFERENCE: unmeasured})
    assert "block error" not in markdown_table(found), "there is nothing to compare with"


def test_page(results: StudyResults) -> None:
    page = render(results)
    assert "a | b &lt;i&gt;" in page
    assert "<i>" not in page
    assert page == render(results), "the same bytes"
    assert '<th dir="auto">blocks.0</th>' in page
    assert "+10.00</span></td>" in page, "block 0 lost 10 dB with both seeds"
    assert page.count("<figure>") == 1, "an axis of which only one place was measured has no line"
    assert "2 runs failed and are not in the means" in page
    assert "<dt>bits</dt><dd>activation 7, weight 5</dd>" in page, "no dictionary of Python"


def test_any_script_names_a_setting(results: StudyResults, tmp_path: Path) -> None:
    """What the figures' font lacks stands in the page, by the number that the figure shows."""
    assert '<dt>(1)</dt><dd dir="auto">雪の中 🐱</dd>' in render(made(tmp_path, "雪の中 🐱"))
    assert '<dl class="legend">' not in render(results)
