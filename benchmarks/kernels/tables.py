"""Tables of the kernels' records, of this form and of the form that recorded attention before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness import Row, markdown


def attention_rows(document: Mapping[str, Any]) -> list[Row]:
    """Rows of attention that were measured, the relative error under `error`."""
    if "results" in document:
        return [row for row in document["results"] if row["ms"] is not None]
    return [row | {"error": row.get("relative_error")} for row in document["rows"] if "tflops" in row]


def attention_table(document: Mapping[str, Any]) -> str:
    """The fastest variant of each case that ran."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in attention_rows(document):
        key = (row["case"], row.get("density"), row.get("kinds"), row.get("corrections"))
        if key not in best or row["ms"] < best[key]["ms"]:
            best[key] = row
    lines = []
    for row in best.values():
        tile = "{rows} × {columns}, {warps} warps, {stages} stages".format(**row["tile"]) if row.get("tile") else "-"
        density = f"{100 * row['density']:.0f} %" if row.get("density") else "-"
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        names = [row["case"], density, row.get("kinds") or "-", str(row.get("corrections") or "-"), tile]
        lines.append([*names, f"{row['ms']:.1f}", f"{row['tflops']:.0f}", error])
    return markdown(("kernel", "density", "heads", "corrections", "tile", "ms", "TFLOP/s", "error"), lines)


def linear_table(document: Mapping[str, Any]) -> str:
    """All rows, and the means of the products."""
    head = ("kernel", "case", "variant", "ms", "rate", "of the ceiling", "error")
    table = markdown(head, [_cells(row) for row in document["rows"]])
    means = ", ".join(f"{variant} {rate:.0f}" for variant, rate in document["mean_tops"].items())
    return f"{table}\n\nMean of the products, TOPS: {means}." if means else table


def _cells(row: Row) -> list[str]:
    head = [row["group"], row["case"], row["variant"]]
    if "ms" not in row:
        return [*head, str(row.get("error") or row.get("skipped")), "", "", ""]
    error = f"{row['relative_error']:.1e}" if row.get("relative_error") is not None else ""
    if "exact" in row:
        error = "exact" if row["exact"] else "WRONG"
    if "codes_beside" in row:
        error += f", {row['codes_beside']:.2%} of codes by {row['largest_difference']}"
    rates = {"tops": "TOPS", "gb_s": "GB/s", "tflops": "TFLOP/s"}
    rate = next((f"{row[name]:.0f} {unit}" for name, unit in rates.items() if name in row), "")
    share = f"{row['share']:.0%}" if "share" in row else ""
    return [*head, f"{row['ms']:.4f}", rate, share, error]


def mean_tops(rows: list[Row]) -> dict[str, float]:
    """TOPS over the products, operations over time, for variants that ran on every case."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["group"] == "linear" and "tops" in row:
            found.setdefault(row["variant"], []).append(row)
    most = max(map(len, found.values()), default=0)
    return {
        variant: sum(row["tops"] * row["ms"] for row in own) / sum(row["ms"] for row in own)
        for variant, own in found.items()
        if len(own) == most
    }
