"""The README's table: speed and memory at full size, and the quality of the same knobs on the small model.

python -m benchmarks.speed_table --page README.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness import RESULTS, gib, markdown, read_record, write_table
from benchmarks.step_times import StepTime, attention_of, step_time
from benchmarks.study_table import velocity_rows
from pipeline.report.quantities import NOTHING, interval_text

STUDY = "knobs"
PLAIN = {"diffusers as it comes, bf16": "diffusers", "bf16, compiled and fused": "strongest bf16"}
"""Cases of dit_step.json that lose nothing."""
SETTINGS = {
    "W4A8, dense attention": "sparse / dense",
    "W4A8, 25 % in a sparse step, 12 dense first steps": "sparse / d25-w12",
    "W4A8, 25 %, 5 dense first steps, placed refreshes: the sparse preset": "sparse",
    "W4A8, 15 %, 12 dense first steps, attention in 8 bits": "sparse / d15-w12-fp8",
    "W4A8, 15 %, no dense first step, attention in 8 bits": "sparse / d15-w0-fp8",
}
"""Rows of the study."""


def speed_table() -> str:
    """Markdown."""
    study, times = read_record(RESULTS / f"study_{STUDY}.json"), read_record(RESULTS / "dit_step.json")["results"]
    measured = {row.name: row for row in velocity_rows(study, SETTINGS["W4A8, dense attention"])}
    base = times["diffusers"]["mean_s"]
    lines = []

    def line(name: str, density: float, time: StepTime, quality: str) -> list[str]:
        cells = [f"{100 * density:.1f} %", f"{time.seconds:.2f}", f"{base / time.seconds:.2f}×"]
        return [name, *cells, gib(time.peak_bytes), quality]

    for name, case in PLAIN.items():
        lines.append(line(name, 1.0, StepTime(times[case]["mean_s"], times[case]["peak_bytes"]), NOTHING))
    for name, setting in SETTINGS.items():
        row, attention = measured[setting], attention_of(study, setting)
        time = None if attention is None else step_time(attention, times)
        assert time is not None, setting
        assert row.velocity is not None, setting
        lines.append(line(name, row.means["effective_density"], time, f"{interval_text(row.velocity.mean)} dB"))
    head = ("setting", "pairs", "s a step", "to diffusers", "peak, GiB", "velocity SQNR, small model")
    return markdown(head, lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, required=True, help="has markers of the name speed")
    write_table(parser.parse_args(arguments).page, "speed", speed_table())


if __name__ == "__main__":
    main()
