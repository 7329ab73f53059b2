"""What kernel benchmarks on a CUDA GPU share: timing, ceilings, a record that survives a failing case, a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

L2_BYTES = 128 * 2**20
"""What the buffers of a graph must exceed together: more than twice the L2 of an H100."""

Row = dict[str, Any]


class Recorder:
    """Measures calls until the time is up, and keeps one row for each, whatever becomes of it."""

    def __init__(self, budget_s: float) -> None:
        self.begin = time.monotonic()
        self.budget_s = budget_s
        self.rows: list[Row] = []

    def add(self, group: str, case: str, variant: str, call: Callable[[], Row]) -> Row:
        """`call` returns the row's figures; its exception becomes the row's error."""
        row: Row = {"group": group, "case": case, "variant": variant}
        begin = time.monotonic()
        if begin > self.begin + self.budget_s:
            row["skipped"] = f"the {self.budget_s:.0f} s of --budget were up"
        else:
            try:
                row |= call()
            except Exception as error:  # noqa: BLE001  one case must not end the run
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                torch.cuda.empty_cache()
            row["spent_s"] = round(time.monotonic() - begin, 2)
        self.rows.append(row)
        print({key: value for key, value in row.items() if key != "config"}, file=sys.stderr, flush=True)
        return row


def timed(call: Callable[[], object]) -> Row:
    """Milliseconds, L2 flushed before each run: median, and the 20th and 80th percentile."""
    from triton.testing import do_bench

    median, low, high = do_bench(call, warmup=30, rep=120, quantiles=[0.5, 0.2, 0.8])
    return {"ms": median, "ms_20": low, "ms_80": high}


def timed_in_graph(calls: Sequence[Callable[[], object]]) -> Row:
    """Milliseconds of one of `calls`, which run one after the other in a CUDA graph: for what a launch outlasts."""
    from triton.testing import do_bench_cudagraph

    median, low, high = do_bench_cudagraph(lambda: [call() for call in calls], rep=30, quantiles=[0.5, 0.2, 0.8])
    return {"ms": median / len(calls), "ms_20": low / len(calls), "ms_80": high / len(calls)}


def ceilings(record: Recorder) -> tuple[float, float]:
    """GB/s of a device copy, bytes read and written, and TFLOP/s of a bf16 product of 8192^3."""

    def copy() -> Row:
        source = torch.randn(2**29, device="cuda")
        target = torch.empty_like(source)
        times = timed(lambda: target.copy_(source))
        return {**times, "gb_s": 2 * source.nbytes / times["ms"] / 1e6}

    def product() -> Row:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        times = timed(lambda: torch.mm(a, b))
        return {**times, "tops": 2 * 8192**3 / times["ms"] / 1e9}

    copied = record.add("ceiling", "copy 2 GiB", "torch", copy)
    multiplied = record.add("ceiling", "bf16 8192^3", "torch.mm", product)
    return copied.get("gb_s", float("nan")), multiplied.get("tops", float("nan"))


def rated(row: Row, operations: float, ceiling: float) -> Row:
    """With TOPS and their share of `ceiling`."""
    rate = operations / row["ms"] / 1e9
    return {**row, "tops": rate, "share": rate / ceiling}


def moved(row: Row, num_bytes: float, ceiling: float) -> Row:
    """With GB/s and their share of `ceiling`."""
    rate = num_bytes / row["ms"] / 1e6
    return {**row, "gb_s": rate, "share": rate / ceiling}


def table(rows: list[Row]) -> str:
    """Markdown, as measured."""
    return "\n".join(_lines(rows))


def _lines(rows: list[Row]) -> Iterator[str]:
    yield "| kernel | case | variant | ms | rate | of the ceiling | error |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        head = f"| {row['group']} | {row['case']} | {row['variant']} "
        if "ms" not in row:
            yield f"{head}| {row.get('error') or row.get('skipped')} | | | |"
            continue
        error = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
        if "exact" in row:
            error = "exact" if row["exact"] else "WRONG"
        if "codes_beside" in row:
            error += f", {row['codes_beside']:.2%} of codes by {row['largest_difference']}"
        rate = f"{row['tops']:.0f} TOPS" if "tops" in row else f"{row['gb_s']:.0f} GB/s"
        share = f"{row['share']:.0%}" if "share" in row else ""
        yield f"{head}| {row['ms']:.4f} | {rate} | {share} | {error} |"
