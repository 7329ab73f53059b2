"""The table of a recorded study, as Markdown between two markers of a page; settings with fewer seeds say so.

    python -m benchmarks.study_table benchmarks/results/study_joint.json --reference naive --page docs/results.md

Reads a study's `results.json`, or what was recorded of one:
`{"settings": {name: {seed: {prompt: {"psnr_db": ..., "ssim": ..., "recognized": ..., "effective_density": ...}}}}}`.
Differences are paired over (seed, prompt) with the reference, with the 95 % interval of their mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from pipeline.study.intervals import mean_interval

Videos = dict[tuple[str, str], dict[str, Any]]
WORST_SHARE = 0.05


def by_setting(document: dict[str, Any]) -> dict[str, Any]:
    """Values by setting, seed and prompt, of either kind of document."""
    settings = document["settings"]
    if isinstance(settings, dict):
        return settings
    found = {
        setting["name"]: {seed: result["prompts"] for seed, result in setting["seeds"].items() if result["prompts"]}
        for setting in settings
    }
    shared = {"full precision": document["full_precision"], "noise floor": document["noise_floor"]}
    return found | {name: seeds for name, seeds in shared.items() if seeds}


def videos(seeds: dict[str, dict[str, dict[str, Any]]]) -> Videos:
    """One setting's values by (seed, prompt)."""
    return {(seed, prompt): values for seed, prompts in seeds.items() for prompt, values in prompts.items()}


def row(name: str, seeds: dict[str, dict[str, dict[str, Any]]], reference: Videos) -> str:
    """One line of the table."""
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
            interval = mean_interval(apart)
            assert interval is not None
            paired = f"{interval.mean:+.2f} ± {interval.half_width:.2f}"
    if any("effective_density" in values for values in own.values()):
        density = f"{100 * statistics.fmean(v['effective_density'] for v in own.values()):.1f} %"
    read = [float(values["recognized"]) for values in own.values() if "recognized" in values]
    recognized = f"{100 * statistics.fmean(read):.1f} %" if read else "-"
    return f"| {name} | {len(seeds)} | {density} | {psnr} | {paired} | {worst} | {ssim} | {recognized} |"


def table(document: dict[str, Any], reference: str) -> str:
    """Markdown, best first.

    Raises:
        ValueError: the document has no setting `reference`.
    """
    settings = by_setting(document)
    if reference not in settings:
        raise ValueError(f"no setting {reference!r}: there are {', '.join(sorted(settings))}")
    base = videos(settings[reference])

    def quality(name: str) -> float:
        found = [values["psnr_db"] for values in videos(settings[name]).values() if "psnr_db" in values]
        return -statistics.fmean(found) if found else -1e9

    head = (
        f"| setting | seeds | effective density | PSNR, dB | to {reference}, dB | worst 5 %, dB | SSIM | recognized |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    names = sorted(settings, key=quality)
    return "\n".join([head, *(row(name.replace("-", " "), settings[name], base) for name in names)])


def write_table(page: Path, name: str, text: str) -> None:
    """Puts `text` between `<!-- name -->` and `<!-- /name -->` of the page.

    Raises:
        ValueError: the page lacks the markers.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(opening)
    _, end, after = rest.partition(closing)
    if not found or not end:
        raise ValueError(f"{page} lacks the markers {opening} and {closing}")
    page.write_text(f"{before}{opening}\n{text}\n{closing}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--reference", required=True, help="setting to which differences are given")
    parser.add_argument("--page", type=Path, required=True, help="has markers of the results file's name")
    given = parser.parse_args(arguments)
    write_table(given.page, given.results.stem, table(json.loads(given.results.read_text()), given.reference))


if __name__ == "__main__":
    main()
