"""How much each preset loses: PSNR, SSIM and recognition on held-out prompts against full precision, over several seeds.

    python -m benchmarks.presets configs/presets.yaml --seeds 0 1 2 --output benchmarks/results/presets.json
    python -m benchmarks.presets --page docs/results_appendix.md --output benchmarks/results/presets.json  # from the JSON

A seed decides everything that is random: the noise of calibration and evaluation videos, and the order of the samples. Each
seed is a run of its own (`<run>-seed-<n>`), resumable; means and deviations over seeds are of the seeds' means.
"""

from __future__ import annotations

import platform
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import markdown, parser, read_record, write_json, write_table
from pipeline.config.loading import load_config
from pipeline.context import Run, build_context
from pipeline.provenance import provenance
from pipeline.run_units import FULL_PRECISION
from pipeline.runner import open_run, run_stages

METRICS = ("psnr_db", "ssim", "recognized")


def run_seed(config: Path, seed: int, overrides: list[str], console: Console) -> Run:
    """The whole run with one seed."""
    base = load_config(config, overrides)
    loaded = load_config(config, [*overrides, f"seed={seed}", f"run={base.run}-seed-{seed}"])
    run = open_run(build_context(loaded), update=False)
    run_stages(run, console)
    return run


def measured(run: Run) -> dict[str, dict[str, Any]]:
    """By model: every prompt's metrics, and the size of the checkpoint."""
    prompts = [prompt.name for prompt in run.context.held_out_prompts]
    found: dict[str, dict[str, Any]] = {}
    for model in (FULL_PRECISION, *(method.name for method in run.context.methods)):
        results = [run.records.read("evaluation", f"{model}-{prompt}") for prompt in prompts]
        values = [record.result for record in results if record is not None]
        found[model] = {metric: [v[metric] for v in values] for metric in METRICS if metric in values[0]}
        assembled = run.records.read("assembly", model)
        if assembled is not None:
            found[model]["transformer_bytes"] = assembled.result["transformer_bytes"]
            found[model]["compression"] = assembled.result["compression"]
    return found


def summary(seeds: dict[Any, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """By model: mean and standard deviation over the seeds' means, and the worst video."""
    by_model: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    worst: dict[str, list[float]] = defaultdict(list)
    for models in seeds.values():
        for model, values in models.items():
            for metric in METRICS:
                if metric in values:
                    by_model[model][metric].append(statistics.fmean(float(v) for v in values[metric]))
            worst[model] += values.get("psnr_db", [])
    rows: dict[str, dict[str, float]] = {}
    for model, metrics in by_model.items():
        rows[model] = {}
        for metric, means in metrics.items():
            rows[model][f"{metric}_mean"] = statistics.fmean(means)
            rows[model][f"{metric}_sd"] = statistics.stdev(means) if len(means) > 1 else 0.0
        if worst[model]:
            rows[model]["psnr_db_worst"] = min(worst[model])
        sizes = [models[model]["compression"] for models in seeds.values() if "compression" in models[model]]
        if sizes:
            rows[model]["compression"] = sizes[0]
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown, best first."""
    lines = []
    for model, row in sorted(rows.items(), key=lambda item: -item[1].get("psnr_db_mean", 1e9)):
        psnr = f"{row['psnr_db_mean']:.2f} ± {row['psnr_db_sd']:.2f}" if "psnr_db_mean" in row else "-"
        worst = f"{row['psnr_db_worst']:.2f}" if "psnr_db_worst" in row else "-"
        ssim = f"{row['ssim_mean']:.4f}" if "ssim_mean" in row else "-"
        read = f"{100 * row['recognized_mean']:.1f} %" if "recognized_mean" in row else "-"
        size = f"{row['compression']:.2f}× smaller" if "compression" in row else "16 bits"
        lines.append([model, psnr, worst, ssim, read, size])
    return markdown(("model", "PSNR, dB", "worst video, dB", "SSIM", "recognized", "`transformer/`"), lines)


def main() -> None:
    """Command line."""
    given = parser(__doc__)
    given.add_argument("config", type=Path, nargs="?", default=Path("configs/presets.yaml"))
    given.add_argument("--page", type=Path, help="run nothing: write the recorded table into this page")
    given.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY.PATH=VALUE")
    arguments = given.parse_args()
    if arguments.page is not None:
        write_table(arguments.page, "presets", table(summary(read_record(arguments.output)["seeds"])))
        return
    console = Console()
    seeds: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in arguments.seeds:
        run = run_seed(arguments.config, seed, arguments.overrides, console)
        seeds[seed] = measured(run)
        document = {
            "config": run.context.config.identity(),
            "provenance": provenance(),
            "hardware": {
                "machine": platform.machine(),
                "device": next(
                    record.device for (stage, _), record in run.records.all().items() if stage == "evaluation"
                ),
            },
            "seeds": seeds,
            "summary": summary(seeds),
        }
        write_json(arguments.output, document)
    console.print(table(summary(seeds)))


if __name__ == "__main__":
    main()
