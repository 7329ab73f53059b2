"""Seconds of a denoising step through fused blocks and over single operations, of several checkouts in turn.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.fusion_modes --checkouts before=/tmp/before after=. --output benchmarks/results/fusion_modes.json

Shows what a change costs: the same model (W4A8, random weights with outliers, 720 x 1280 x 61) on the same card, a process a
checkout, the checkouts in turn and again. `fused`: dense attention through fused blocks; `fused sparse`: one interval of 15 %
attention, a refresh in it; `single operations`: dense attention, `block_fusion.mode = "off"`. Of HunyuanVideo-13B's 20
double-stream and 40 single-stream blocks there are 4 and 8.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import parser, settings_of, write_record

REPEATS = 5
INTERVAL = 5


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every timed step by case, in this process, with the packages that its PYTHONPATH names."""
    from benchmarks.dit_step.models import bf16_transformer, inputs_of, make_sparse, quantize_in_place, sparse_spec
    from benchmarks.dit_step.timing import Generation

    device = torch.device(options.device)
    changes = {"num_layers": options.double, "num_single_layers": options.single, "num_attention_heads": options.heads}
    model = bf16_transformer(changes, device)
    quantize_in_place(model, weight_bits=4, activation_bits=8)
    inputs = inputs_of(model, tuple(options.layout), text=256, real_text=60)
    found: dict[str, list[float]] = {}
    for case, mode in (("fused", "on"), ("single operations", "off")):
        model.block_fusion.mode = mode
        generation = Generation(model, inputs)
        generation.step()
        generation.step()
        found[case] = [generation.step() for _ in range(REPEATS)]
    model.block_fusion.mode = "on"
    make_sparse(model, sparse_spec(dict(model.config), density=0.15, dense_steps=0, interval=INTERVAL, rank=16))
    generation = Generation(model, inputs)
    steps = [generation.step() for _ in range(3 * INTERVAL)]
    found["fused sparse"] = steps[-INTERVAL:]
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All checkouts in turn, `rounds` times."""
    checkouts = dict(entry.split("=", 1) for entry in options.checkouts)
    runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, folder in checkouts.items():
            runs[name].append(_in_process(folder, options))
            print(name, {case: round(statistics.fmean(steps), 4) for case, steps in runs[name][-1].items()}, flush=True)
    # A step's median; of an interval of sparse steps the mean, as its refresh is another kind of step.
    summary = {
        name: {case: min(_figure(case, run[case]) for run in found) for case in found[0]}
        for name, found in runs.items()
    }
    return {"runs": runs, "best_s": summary}


def _figure(case: str, steps: list[float]) -> float:
    return statistics.fmean(steps) if case == "fused sparse" else statistics.median(steps)


def _in_process(folder: str, options: argparse.Namespace) -> dict[str, list[float]]:
    paths = [str(Path(folder).resolve()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)[:1])]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "steps.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", "--output", str(output)]
        command += ["--device", options.device, "--double", str(options.double), "--single", str(options.single)]
        command += ["--heads", str(options.heads), "--layout", *map(str, options.layout)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=True, cwd=scratch)
        found: dict[str, list[float]] = json.loads(output.read_text(encoding="utf-8"))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__)
    given.add_argument("--checkouts", nargs="+", default=["here=."], metavar="NAME=FOLDER")
    given.add_argument("--rounds", type=int, default=2)
    given.add_argument("--layout", type=int, nargs=3, default=[16, 45, 80], help="tokens: frames, rows, columns")
    given.add_argument("--double", type=int, default=4)
    given.add_argument("--single", type=int, default=8)
    given.add_argument("--heads", type=int, default=24)
    given.add_argument("--device", default="cuda", help="cpu, with a small model, shows that the script works")
    given.add_argument("--measure", action="store_true", help="measure in this process (used by itself)")
    options = given.parse_args(arguments)
    if options.measure:
        options.output.write_text(json.dumps(measure(options)), encoding="utf-8")
        return
    settings = settings_of(options, "checkouts", "measure")
    document = write_record(options.output, torch.device(options.device), settings, results=compare(options))
    print(json.dumps(document["results"]["best_s"], indent=1))


if __name__ == "__main__":
    main()
