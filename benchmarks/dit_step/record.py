"""The cases, the file with their results, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.dit_step.schedule import MEASURED, SCHEDULE
from benchmarks.harness import gib, markdown, read_record
from reelquant.ops.band_attention.op import Precision

WHOLE = ("ours 15 %", "ours 15 %, 8-bit attention")
"""The cases of which a whole schedule is run."""


class SparseCase(NamedTuple):
    """A compressed model with sparse attention."""

    density: float
    dense_steps: int = 0
    precision: Precision = "full"
    """Of all its attention."""


SPARSE = {
    "ours 15 %": SparseCase(0.15),
    "ours 25 %": SparseCase(0.25),
    "ours 15 %, dense first 10 %": SparseCase(0.15, SCHEDULE // 10),
    "ours 25 %, dense first 10 %": SparseCase(0.25, SCHEDULE // 10),
    "ours 15 %, 8-bit attention": SparseCase(0.15, precision="int8_fp8"),
    "ours 25 %, 8-bit attention": SparseCase(0.25, precision="int8_fp8"),
}
CASES = ("diffusers", "compiled", "strongest bf16", "fp8 linears", "ours 100 %", "ours 100 %, 8-bit attention", *SPARSE)
MUST_AGREE = ("layout", "double", "single", "rank", "weight_bits")
"""Settings that results in one file share."""


def table(document: dict[str, Any]) -> str:
    """Markdown: every case against the two baselines."""
    results = document["results"]
    head = ("case", "mean step, s", "how", "refresh, s", "sparse, s", "pairs of the schedule", "peak, GiB")
    lines = []
    for name in sorted(results, key=CASES.index):
        row = results[name]
        if "error" in row:
            lines.append([name, row["error"][:80], *[""] * 7])
            continue
        kinds = row.get("by_kind_s", {})
        cells = [f"{row['mean_s']:.3f}", row.get("how", MEASURED)]
        cells += [f"{kinds[kind]:.3f}" if kind in kinds else "-" for kind in ("refresh", "sparse")]
        cells.append(f"{100 * row.get('effective_density', 1.0):.1f} %")
        cells.append(gib(row["peak_bytes"]))
        for base in ("diffusers", "strongest bf16"):
            mean = results.get(base, {}).get("mean_s")
            cells.append(f"{mean / row['mean_s']:.2f}×" if mean else "-")
        lines.append([name, *cells])
    return markdown((*head, "to diffusers", "to strongest bf16"), lines)


def kept_results(path: Path, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the file has, for a run on `device` with `settings` to add to.

    Raises:
        ValueError: it was measured on another device or with other settings; names them.
    """
    if not path.exists():
        return {}
    document = read_record(path)
    old = document["settings"] | {"device": document["environment"]["device"]}
    new = settings | {"device": device}
    apart = [f"{name} {old[name]!r}, now {new[name]!r}" for name in (*MUST_AGREE, "device") if old[name] != new[name]]
    if apart:
        raise ValueError(f"{path} was measured with {'; '.join(apart)}: give another --output, or leave --merge away")
    kept: dict[str, Any] = document["results"]
    return kept
