"""Fills the tables of `docs/performance.md`, and draws its roofline, from the records in `benchmarks/results`.

    python -m benchmarks.performance_page --page docs/performance.md

A section lies between `<!-- name -->` and `<!-- /name -->`, by the name of its record; what stands outside of the markers is
written by hand and stays. Without a record the section says `not measured`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import (
    ceilings,
    distillation_time,
    generation_time,
    kernel_parity,
    roofline,
    sharded_forward,
)
from benchmarks.dit_step import kernel_table, record
from benchmarks.full_size import tables as full_size
from benchmarks.harness import RESULTS, markdown, read_record, write_table
from benchmarks.kernels.tables import attention_table, linear_table

KERNEL_CASES = ("diffusers", "strongest bf16", "ours 15 %", "ours 15 %, 8-bit attention")
"""Whose kernels the page shows; the record has those of all."""


def step_kernels(document: dict[str, Any]) -> str:
    """Of the cases that others are compared with, in the order of the record."""
    shown = {case: found for case, found in document["results"].items() if case in KERNEL_CASES}
    return kernel_table.tables(document | {"results": shown})


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "dit_step": ("dit_step", record.table),
    "dit_step_kernels": ("dit_step", step_kernels),
    "dit_step_480p": ("dit_step_480p", record.table),
    "generation_time": ("generation_time", generation_time.table),
    "kernel_parity": ("kernel_parity", kernel_parity.table),
    "attention_kernels": ("attention_kernels", attention_table),
    "eight_bit_attention": ("eight_bit_attention", attention_table),
    "linear_kernels": ("linear_kernels", linear_table),
    "sharded_forward": ("sharded_forward", sharded_forward.table),
    "sharded_forward_whole": ("sharded_forward_whole", sharded_forward.table),
    "distillation_time": ("distillation_time", distillation_time.table),
    "distillation_deterministic": ("distillation_deterministic", distillation_time.comparison),
    "fake_quantization": ("fake_quantization", linear_table),
    "full_size": ("full_size", full_size.table),
}
"""By section: its record, and what makes a table of it."""


def section(name: str, results: Path) -> str:
    """The table, and where it was measured."""
    file, table = SECTIONS[name]
    document = _read(results / f"{file}.json")
    if document is None:
        return "Not measured."
    where = document["environment"]
    source = f"{where['device']}, torch {where['torch']}, {where['date']}, commit {(where['commit'] or 'unknown')[:7]}"
    return f"{table(document)}\n\n`{file}.json`: {source}."


def ceilings_table() -> str:
    """What other rates are compared with."""
    found = {
        "bf16 products": ceilings.BF16,
        "FP8 products": ceilings.FP8,
        "INT8 products": ceilings.INT8,
        "memory": ceilings.COPY,
        "dense attention": ceilings.DENSE_ATTENTION,
    }
    rows = [[name, f"{one.rate:.0f} {one.unit}", one.source] for name, one in found.items()]
    return markdown(("ceiling", "rate", "measured"), rows)


def points(results: Path) -> list[roofline.Point]:
    """Of all records that there are."""
    found: list[roofline.Point] = []
    for name, points_of in (
        ("attention_kernels", roofline.attention_points),
        ("linear_kernels", roofline.linear_points),
        ("dit_step", roofline.step_points),
    ):
        document = _read(results / f"{name}.json")
        found += [] if document is None else points_of(document)
    return found


def _read(path: Path) -> dict[str, Any] | None:
    return read_record(path) if path.exists() else None


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, required=True, help="has the markers of all sections")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    write_table(given.page, "ceilings", ceilings_table())
    for name in SECTIONS:
        write_table(given.page, name, section(name, given.results))
    with matplotlib.rc_context({"svg.hashsalt": "roofline", "svg.fonttype": "none"}):
        roofline.draw(points(given.results), given.page.parent / "roofline.svg")


if __name__ == "__main__":
    main()
