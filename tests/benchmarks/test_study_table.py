"""The table of a recorded study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.study_table import main, table, velocity_rows
from pipeline.study.rows import NOISE_FLOOR, flat_row
from tests.errors import raises

ROOT = Path(__file__).parents[2]
THIRDS = ("velocity_sqnr_db_early", "velocity_sqnr_db_middle", "velocity_sqnr_db_late")
DOCUMENT = {
    "settings": {
        "naive": {"0": {"p0": {"psnr_db": 20.0, "ssim": 0.9}, "p1": {"psnr_db": 22.0, "ssim": 0.8}}},
        "ours-2": {
            "0": {"p0": {"psnr_db": 30.0, "ssim": 0.99}, "p1": {"psnr_db": 34.0, "ssim": 0.97}},
            "1": {"p0": {"psnr_db": 36.0, "ssim": 0.99}, "p1": {"psnr_db": 36.0, "ssim": 0.97}},
        },
        "full precision": {"0": {"p0": {"recognized": True}, "p1": {"recognized": False}}},
    }
}


def test_rows_are_best_first_and_paired_where_both_have_the_video() -> None:
    lines = table(DOCUMENT, "naive").splitlines()[2:]
    # Pairs differ by 10 and 12: 11 ± 12.706 * 1.4142 / sqrt(2).
    assert lines[1] == "| ours 2 | 2 | - | 34.00 ± 2.83 | +11.00 ± 12.71 | 30.00 | 0.9800 | - |"
    assert lines[2] == "| naive | 1 | - | 21.00 | - | 20.00 | 0.8500 | - |"
    assert lines[0] == "| full precision | 1 | - | - | - | - | - | 50.0 % |"
    with raises(ValueError, "'x'", "full precision, naive, ours-2"):
        table(DOCUMENT, "x")


def seed(first: float, second: float, **prompts: dict[str, float]) -> dict[str, object]:
    losses = {"transformer_blocks.0": first, "single_transformer_blocks.0": second}
    return {"prompts": prompts, "block_errors": {"losses": losses, "basis": "samples"}}


def study(**settings: dict[str, object]) -> dict[str, object]:
    found = [{"name": name, "seeds": seeds} for name, seeds in settings.items()]
    return {"settings": found, "full_precision": {}, "noise_floor": {}}


def test_block_errors_are_a_column_more() -> None:
    film = {"psnr_db": 20.0, "ssim": 0.5}
    plain: dict[str, object] = {"prompts": {"p": film}, "block_errors": None}
    document = study(all={"0": seed(1.0, 1.0, p=film)}, part={"0": seed(10.0, 1.0, p=film)}, rtn={"0": plain})
    head, _, *lines = table(document, "all").splitlines()
    assert head.endswith("| recognized | block error, to all, dB |")
    assert table(document, "rtn").splitlines()[0].endswith("| recognized |"), "there is nothing to compare with"
    assert lines == [
        "| all | 1 | - | 20.00 | - | 20.00 | 0.5000 | - | - |",
        "| part | 1 | - | 20.00 | - | 20.00 | 0.5000 | - | +5.00 |",
        "| rtn | 1 | - | 20.00 | - | 20.00 | 0.5000 | - | - |",
    ]


def test_without_videos_block_errors_are_all_there_is_by_kind_too() -> None:
    document = study(
        part={"0": seed(10.0, 1.0), "1": seed(10.0, 10.0)}, all={"0": seed(1.0, 1.0), "1": seed(1.0, 1.0)}, rtn={}
    )
    assert table(document, "all").splitlines() == [
        "| setting | seeds | block error, to all, dB | `single_transformer_blocks`, dB | `transformer_blocks`, dB |",
        "|---|---|---|---|---|",
        "| all | 2 | - | - | - |",
        "| part | 2 | +7.50 ± 31.77 | +5.00 ± 63.53 | +10.00 ± 0.00 |",
        "| rtn | 0 | - | - | - |",
    ]


VELOCITY_ROWS = {
    "study_features": "uniform",
    "study_features_50": "uniform",
    "study_calibration": "rtn W4A8",
    "study_residual_kinds": "gain / order-1",
    "study_knobs": "sparse / d25-w5",
    "study_attention_terms": "calibrated dense, terms none, W4A8",
}


def test_a_study_with_velocities_is_ranked_by_them_not_by_its_videos() -> None:
    def seeds(velocity: float, psnr: float) -> dict[str, object]:
        scores = {"velocity_sqnr_db": velocity, **dict.fromkeys(THIRDS, velocity - 1)}
        prompts = {"p0": {**scores, "psnr_db": psnr, "ssim": 0.9}, "p1": scores, "p2": {**scores, "psnr_db": psnr}}
        return {"0": {"prompts": prompts}, "1": {"prompts": {name: prompts[name] for name in ("p0", "p1", "p2")}}}

    document = study(**{"a-b": seeds(20.0, 40.0), "better": seeds(22.5, 30.0), "twin": seeds(22.5, 30.0)})
    document |= {"fork_db": 35.0, "noise_floor": {"0": {"p0": {"velocity_sqnr_db": 36.0}}}}
    head, _, *lines = table(document, "a-b").splitlines()
    assert head == (
        "| setting | seeds | velocity SQNR, dB | to a-b, dB | early / middle / late, dB | early commit, dB | forks "
        "| PSNR, to a-b, dB | mean PSNR, dB |"
    )
    assert lines == [
        "| noise floor | 1 | 36.00 | – | – | – | – | – | – |",
        "| better, twin | 2 | 22.50 ± 0.00 | +2.50 [+2.50, +2.50] | 21.5 / 21.5 / 21.5 | – | 100 % [34, 100], p 0.5 | -10.00 "
        "| 30.00 ± 0.00 |",
        "| a-b | 2 | 20.00 ± 0.00 | – | 19.0 / 19.0 / 19.0 | – | 0 % [0, 66] | – | 40.00 ± 0.00 |",
    ]
    with raises(ValueError, "'x'", "a-b, better, noise floor, twin"):
        table(document, "x")


@pytest.mark.parametrize(("name", "reference"), VELOCITY_ROWS.items())
def test_rows_with_velocities_are_those_of_the_record(name: str, reference: str) -> None:
    """Also of a record without the arrays of single steps."""
    document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    recorded = {row["setting"]: row for row in document["table"] if row["velocity_sqnr_db"] is not None}
    made = {row.name: flat_row(row) for row in velocity_rows(document, reference)}
    assert len(made) == len(recorded)
    for setting, row in made.items():
        of_record = recorded[NOISE_FLOOR if setting == "noise floor" else setting]
        for key in ("velocity_sqnr_db", "velocity_sqnr_db_difference_low", "early_commit_db", "forks_p", "psnr_db"):
            assert row[key] == pytest.approx(of_record[key], rel=1e-9), (setting, key)


def test_the_page_says_which_differences_at_w4a8_are_known_to_half_a_decibel() -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / "study_calibration.json").read_text())
    presets = ("rtn", "quarot", "gptq", "s2q", "reelquant")
    widths = {}
    for second in presets:
        for row in velocity_rows(document, f"{second} W4A8"):
            first = row.name.removesuffix(" W4A8")
            if first in presets and row.velocity is not None and row.velocity.difference is not None:
                widths[frozenset((first, second))] = row.velocity.difference.half_width or 0.0
    met = {pair: width for pair, width in widths.items() if width <= 0.5}
    others = [width for pair, width in widths.items() if pair not in met]
    assert met.keys() == {frozenset(("s2q", "gptq")), frozenset(("reelquant", "gptq"))}
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    s2q, ours = met[frozenset(("s2q", "gptq"))], met[frozenset(("reelquant", "gptq"))]
    assert f"met by {len(met)} of {len(widths)} pairs, `s2q` - `gptq` (± {s2q:.2f})" in text
    assert f"`reelquant` - `gptq` (± {ours:.2f}); the others have ± {min(others):.2f} to ± {max(others):.2f}" in text


def test_the_page_says_how_little_is_known_of_forks() -> None:
    def found(name: str) -> dict[str, float]:
        document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        rows = velocity_rows(document, VELOCITY_ROWS[name])
        return {row.name: row.forks.p for row in rows if row.forks is not None and row.forks.p is not None}

    sure = {name: p for name, p in found("study_knobs").items() if p < 0.05}
    others = min([*found("study_calibration").values(), *found("study_features").values()])
    assert list(sure) == ["sparse / none"]
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    said = f"`none` alone forks surely more (p {sure['sparse / none']:.1g}), of 8 in others (no p below {others:.2g})."
    assert said in text


PAGES = {
    "results.md": ("study_knobs", "study_calibration", "study_features", "study_features_50"),
    "results_appendix.md": ("study_residual_kinds", "study_attention_terms"),
}
"""Studies with velocities by the page that has their table."""
BY_PSNR = {
    "study_joint": "naive",
    "study_residual": "none",
    "study_selection": "uniform",
    "study_selection_finer": "uniform",
    "study_methods": "gptq W4A6",
    "study_density": "gptq, 0.25",
    "study_beyond": "s2q as its paper gives it",
    "study_preset": "dense s2q",
    "study_residual_storage": "low_rank",
    "study_attention_precision": "full",
    "study_tokens_per_step": "all tokens",
    "study_tokens_per_step_blocks": "all tokens",
}


def test_every_record_with_velocities_stands_on_a_page() -> None:
    assert sorted(name for names in PAGES.values() for name in names) == sorted(VELOCITY_ROWS)


@pytest.mark.parametrize(
    ("page", "name", "reference"),
    [
        *((page, name, VELOCITY_ROWS[name]) for page, names in PAGES.items() for name in names),
        *(("results_appendix.md", name, reference) for name, reference in BY_PSNR.items()),
    ],
)
def test_the_page_shows_what_was_recorded(page: str, name: str, reference: str, tmp_path: Path) -> None:
    shown = (ROOT / "docs" / page).read_text()
    (tmp_path / page).write_text(shown)
    results = ROOT / "benchmarks" / "results"
    times = ["--step-times", str(results / "dit_step.json")] if name == "study_knobs" else []
    main([str(results / f"{name}.json"), "--reference", reference, "--page", str(tmp_path / page), *times])
    assert (tmp_path / page).read_text() == shown


def test_the_page_s_small_table_is_of_the_record() -> None:
    """Of the attention terms: each checkpoint's SQNR, and its difference to that calibrated dense without terms."""
    document = json.loads((ROOT / "benchmarks" / "results" / "study_attention_terms.json").read_text())

    def cell(own: str, column: str) -> str:
        bits, attention = column.split(", ")
        row, base = (
            f"calibrated {x.split(', ')[0]}, terms {x.split(', ')[1]}, {bits}{' / dense' if attention == 'dense' else ''}"
            for x in (own, "dense, none")
        )
        [found] = [found for found in velocity_rows(document, base) if found.name == row]
        assert found.velocity is not None
        apart = found.velocity.difference
        text = f"{found.velocity.mean.mean:.1f}"
        return text if apart is None else f"{text}, {apart.mean:+.2f} ± {apart.half_width:.2f}"

    text = (ROOT / "docs" / "results.md").read_text().split("<!-- terms -->")[1].split("<!-- /terms -->")[0]
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines())
    assert [line[0] for line in lines] == ["dense, none", "dense, both", "sparse, none", "sparse, both"]
    for own, *cells in lines:
        assert cells == [cell(own, column) for column in head[1:]]


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "study.json"
    page.write_text("nothing here")
    results.write_text(json.dumps(DOCUMENT))
    with raises(ValueError, page, "<!-- study -->"):
        main([str(results), "--reference", "naive", "--page", str(page)])
