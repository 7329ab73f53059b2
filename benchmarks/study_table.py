"""The table of a recorded study, as Markdown between two markers of a page; settings with fewer seeds say so.

    python -m benchmarks.study_table benchmarks/results/study_joint.json --reference naive --page docs/results.md

Reads a study's `results.json`, or what was recorded of one:
`{"settings": {name: {seed: {prompt: {"psnr_db": ..., "ssim": ..., "recognized": ..., "effective_density": ...}}}}}`.
Differences are paired over (seed, prompt) with the reference, with the 95 % interval of their mean. Where block errors were
recorded, so are theirs over blocks, with the interval of the seeds (`pipeline.study.block_errors`); fewer dB are better. A
study without videos has them by kind of block too.

A study that measured the teacher-forced velocity is ranked by its SQNR, with the estimators of `pipeline.study.rows`. With
`--step-times benchmarks/results/dit_step.json` each row has its mean step at full size, by `benchmarks.step_times`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import markdown, read_record, write_table
from benchmarks.step_times import attention_of, step_time
from pipeline.report.quantities import NOTHING, estimate_text, interval_text
from pipeline.study.block_errors import BlockErrors, block_kind, difference_interval
from pipeline.study.intervals import Interval, mean_interval
from pipeline.study.rows import Row, make_row
from pipeline.study.tables import difference_text, forks_text, psnr_text, thirds_text

Videos = dict[tuple[str, str], dict[str, Any]]
Errors = dict[int, BlockErrors]
"""Of one setting's blocks, by seed."""
WORST_SHARE = 0.05
SHARED = ("full precision", "noise floor")
"""Rows that belong to no setting and have no reference."""


def by_setting(document: dict[str, Any]) -> dict[str, Any]:
    """Values by setting, seed and prompt, of either kind of document."""
    settings = document["settings"]
    if isinstance(settings, dict):
        return settings
    found = {
        setting["name"]: {seed: result["prompts"] for seed, result in setting["seeds"].items() if result["prompts"]}
        for setting in settings
    }
    shared = dict(zip(SHARED, (document["full_precision"], document["noise_floor"]), strict=True))
    return found | {name: seeds for name, seeds in shared.items() if seeds}


def block_errors(document: dict[str, Any], reference: str) -> dict[str, Errors]:
    """Of the settings that have them, empty if the reference has none; records without any are older than they are."""
    settings = document["settings"]
    found = {
        setting["name"]: {
            int(seed): BlockErrors(**result["block_errors"])
            for seed, result in setting["seeds"].items()
            if result.get("block_errors")
        }
        for setting in (() if isinstance(settings, dict) else settings)
    }
    return {name: errors for name, errors in found.items() if errors} if found.get(reference) else {}


def videos(seeds: dict[str, dict[str, dict[str, Any]]]) -> Videos:
    """One setting's values by (seed, prompt)."""
    return {(seed, prompt): values for seed, prompts in seeds.items() for prompt, values in prompts.items()}


def video_cells(seeds: dict[str, dict[str, dict[str, Any]]], reference: Videos) -> list[str]:
    """Density, PSNR, its difference, the worst videos' PSNR, SSIM and share of recognized ones of one setting."""
    own = videos(seeds)
    measured = sorted(values["psnr_db"] for values in own.values() if "psnr_db" in values)
    psnr = worst = ssim = paired = density = "-"
    if measured:
        means = [statistics.fmean(v["psnr_db"] for v in prompts.values()) for prompts in seeds.values()]
        spread = f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""
        psnr = f"{statistics.fmean(means):.2f}{spread}"
        worst = f"{statistics.fmean(measured[: max(1, int(len(measured) * WORST_SHARE))]):.2f}"
        ssim = f"{statistics.fmean(v['ssim'] for v in own.values()):.4f}"
        apart = [v["psnr_db"] - reference[k]["psnr_db"] for k, v in own.items() if "psnr_db" in reference.get(k, {})]
        if len(apart) > 1 and any(apart):
            paired = difference(mean_interval(apart))
    if any("effective_density" in values for values in own.values()):
        density = f"{100 * statistics.fmean(v['effective_density'] for v in own.values()):.1f} %"
    read = [float(values["recognized"]) for values in own.values() if "recognized" in values]
    recognized = f"{100 * statistics.fmean(read):.1f} %" if read else "-"
    return [density, psnr, paired, worst, ssim, recognized]


def block_cells(own: Errors, reference: Errors, kinds: Sequence[str]) -> list[str]:
    """Difference of one setting's block errors to the reference's: of all blocks, and of each of the kinds."""
    if own is reference:
        return ["-"] * (1 + len(kinds))
    return [difference(difference_interval(own, reference, kind=kind)) for kind in (None, *kinds)]


def difference(interval: Interval | None) -> str:
    """With its 95 % interval, which a single value has none of."""
    if interval is None:
        return "-"
    return f"{interval.mean:+.2f}" + ("" if interval.half_width is None else f" ± {interval.half_width:.2f}")


def velocity_rows(document: dict[str, Any], reference: str) -> list[Row]:
    """Settings and noise floor that have a velocity SQNR, best first; empty for a record without any."""
    settings = {
        name: {int(seed): prompts for seed, prompts in seeds.items()} for name, seeds in by_setting(document).items()
    }
    rows = [
        make_row(
            name,
            None,
            seeds,
            {} if name in (reference, *SHARED) else settings[reference],
            fork_db=document.get("fork_db"),
        )
        for name, seeds in settings.items()
    ]
    found = [(row.velocity.mean.mean, row) for row in rows if row.velocity is not None]
    return [row for _, row in sorted(found, key=lambda pair: -pair[0])]


def _without_twins(rows: Sequence[Row]) -> list[Row]:
    """Rows whose scores are all equal as one with their names, such as of a knob that changes nothing there."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        scores = [
            None if s is None else tuple(s.seed_means.values()) for s in (row.velocity, row.early_commit, row.psnr)
        ]
        twin = found.get(tuple(scores))
        found[tuple(scores)] = row if twin is None else replace(twin, name=f"{twin.name}, {row.name}")
    return list(found.values())


def velocity_table(rows: Sequence[Row], reference: str, seconds: Mapping[str, float]) -> str:
    """Markdown, in the order of `rows`, equal ones in one line; without the columns that no row has anything to say under.

    Args:
        seconds: of a step at full size, by row, as far as known.
    """
    shown = {
        "s a step": bool(seconds),
        "effective density": any("effective_density" in row.means for row in rows),
        "forks": any(row.forks is not None for row in rows),
    }

    def cells(row: Row) -> dict[str, str]:
        velocity, density = row.velocity, row.means.get("effective_density")
        found = {
            "setting": row.name,
            "seeds": f"{0 if velocity is None else len(velocity.seed_means)}",
            "effective density": NOTHING if density is None else f"{100 * density:.1f} %",
            "s a step": f"{seconds[row.name]:.2f}" if row.name in seconds else NOTHING,
            "velocity SQNR, dB": interval_text(velocity.mean if velocity else None),
            f"to {reference}, dB": difference_text(velocity.difference if velocity else None),
            "early / middle / late, dB": thirds_text(row),
            "early commit, dB": interval_text(row.early_commit.mean if row.early_commit else None),
            "forks": forks_text(row.forks),
            f"PSNR, to {reference}, dB": estimate_text(row.typical_difference),
            "mean PSNR, dB": psnr_text(row),
        }
        return {name: text for name, text in found.items() if shown.get(name, True)}

    texts = [cells(row) for row in _without_twins(rows)]
    return markdown(list(texts[0]), [list(text.values()) for text in texts])


def table(document: dict[str, Any], reference: str, step_times: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Markdown, best first: by velocity SQNR where it was measured, otherwise by mean PSNR or block errors.

    Args:
        step_times: the results of dit_step.json, for a study ranked by velocity SQNR.

    Raises:
        ValueError: the document has no setting `reference`.
    """
    settings = by_setting(document)
    if reference not in settings:
        raise ValueError(f"no setting {reference!r}: there are {', '.join(sorted(settings))}")
    if measured := velocity_rows(document, reference):
        return velocity_table(measured, reference, _seconds(document, measured, step_times or {}))
    base = videos(settings[reference])
    errors = block_errors(document, reference)
    has_videos = not errors or any(settings.values())
    kinds = {block_kind(block) for own in errors.values() for seed in own.values() for block in seed.losses}
    shown_kinds = [] if has_videos or len(kinds) < 2 else sorted(kinds)

    def quality(name: str) -> tuple[float, float]:
        found = [values["psnr_db"] for values in videos(settings[name]).values() if "psnr_db" in values]
        blocks = [seed.mean_db for seed in errors.get(name, {}).values()]
        return (-statistics.fmean(found) if found else -1e9, statistics.fmean(blocks) if blocks else math.inf)

    def cells(name: str) -> list[str]:
        own = errors.get(name, {})
        filmed = video_cells(settings[name], base) if has_videos else []
        blocks = block_cells(own, errors[reference], shown_kinds) if errors else []
        return [name.replace("-", " "), f"{len(settings[name] or own)}", *filmed, *blocks]

    head = ["setting", "seeds"]
    if has_videos:
        head += ["effective density", "PSNR, dB", f"to {reference}, dB", "worst 5 %, dB", "SSIM", "recognized"]
    if errors:
        head += [f"block error, to {reference}, dB", *(f"`{kind}`, dB" for kind in shown_kinds)]
    return markdown(head, [cells(name) for name in sorted(settings, key=quality)])


def _seconds(
    document: dict[str, Any], rows: Sequence[Row], step_times: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    attentions = {row.name: attention_of(document, row.name) for row in rows} if step_times else {}
    found = {name: step_time(attention, step_times) for name, attention in attentions.items() if attention is not None}
    return {name: time.seconds for name, time in found.items() if time is not None}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--reference", required=True, help="setting to which differences are given")
    parser.add_argument("--page", type=Path, required=True, help="has markers of the results file's name")
    parser.add_argument("--step-times", type=Path, help="dit_step.json: adds the mean step at full size")
    given = parser.parse_args(arguments)
    times = read_record(given.step_times)["results"] if given.step_times else None
    write_table(given.page, given.results.stem, table(read_record(given.results), given.reference, times))


if __name__ == "__main__":
    main()
