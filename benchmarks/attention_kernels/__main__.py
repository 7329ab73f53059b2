"""Attention kernels beside what torch has, on the same random tensors in one process.

    python -m benchmarks.attention_kernels --output benchmarks/results/attention_kernels.json

At the tokens of HunyuanVideo at 720 x 1280 x 61 (16 x 45 x 80, and 256 of text), 24 heads of size 128, bf16, the columns of
one fused QKV matrix, on a CUDA GPU:

- ``dense``: torch's scaled_dot_product_attention by cuDNN and by FlashAttention 2, first and last (the clock drifts),
- ``band``: the Triton kernel for spatial, temporal and mixed heads over density, tile and load; FlexAttention,
- ``corrected``: the same with one or two rank-16 corrections in its epilogue,
- ``refresh``: dense and band in one pass,
- ``sums``: both passes of the column sums, and all of it,
- ``eight_bit``: attention in 8 bits over tiles, densities, dense and in one pass, and its quantization apart (in ms without
  it where the case does not say so), beside 16 bits; queries, keys and values of norm 1 with a few loud channels.

``--only`` names the groups to run (default: all but ``eight_bit``, which has its own record).

Milliseconds are medians of `triton.testing.do_bench`. TFLOP/s count `4 D` FLOP a pair that the mask leaves (`2 D` for one
pass of the column sums). Errors are relative, in the Frobenius norm, on sampled query rows against float64. A case that
fails is recorded with its error and the rest runs on; cases past `--budget` seconds are recorded as skipped. On a CPU
(`--device cpu`, TRITON_INTERPRET=1, small sizes) the figures only show that the script works. Needs torch and triton alone.

Predicted for the size above on an H100: band at density 0.15 450 TFLOP/s, refresh 90 ms, column sums 75 ms (cuDNN 63 ms);
in 8 bits band at density 0.15 750 TFLOP/s (8.4 ms), dense 54 ms, one pass 55 ms, quantization 0.6 ms, error 3 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_kernels.cases import (
    corrected_cases,
    dense_cases,
    densities,
    flex_cases,
    refresh_cases,
    sums_cases,
    sweep,
)
from benchmarks.attention_kernels.eight_bit_cases import eight_bit_cases
from benchmarks.attention_kernels.problem import Case, drawn, loud
from benchmarks.attention_memory import environment
from reelquant.ops.band_attention.launch import TILES, Tile
from reelquant.tokens import TokenLayout

GROUPS = ("dense", "band", "corrected", "refresh", "sums", "flex")


def measured(case: Case, device: torch.device, deadline: float) -> dict[str, Any]:
    """The case's settings with `ms`, `tflops` and `error`, or with `failed`."""
    row: dict[str, Any] = {"case": case.name, **case.settings, "ms": None, "tflops": None, "error": None}
    row["tile"] = asdict(case.settings["tile"]) if case.settings.get("tile") else None
    if time.perf_counter() > deadline:
        return row | {"failed": "skipped: the time budget is spent"}
    try:
        begin = time.perf_counter()
        result = case.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row["first_s"] = time.perf_counter() - begin
        row["error"] = None if case.error is None else case.error(result)
        del result
        row["ms"] = 1e3 * row["first_s"] if case.once else median_ms(case.call, device)
        row["tflops"] = case.flop / row["ms"] / 1e9
    except Exception as error:  # noqa: BLE001 - one failing case must not end the run; its text is in the result
        row["failed"] = f"{type(error).__name__}: {str(error)[-400:]}"
    return row


def median_ms(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=50, rep=300, return_mode="median"))
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def fastest(rows: list[dict[str, Any]], default: Tile) -> Tile:
    """The tile with the least sum over both kinds of heads among those that ran for both."""
    spent: dict[Tile, list[float]] = {}
    for row in rows:
        if row["case"] == "band triton" and row["ms"] and row["tile"] and row.get("load") is None:
            spent.setdefault(Tile(**row["tile"]), []).append(row["ms"])
    whole = {tile: sum(ms) for tile, ms in spent.items() if len(ms) == 2}
    return min(whole, key=whole.__getitem__, default=default)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'case':<21}{'density':>8}{'kinds':>6}{'tile':>15}{'load':>9}{'ms':>9}{'TFLOP/s':>9}{'error':>10}"]
    for row in rows:
        tile = "{rows}x{columns}x{warps}w{stages}".format(**row["tile"]) if row["tile"] else "-"
        if row["tile"] and not row["tile"].get("promote", True):
            tile += "c"
        if row["tile"] and row["tile"].get("registers"):
            tile += "r"
        if row.get("corrections"):
            tile += f"+{row['corrections']}"
        density, kinds, load = (row.get(name) or "-" for name in ("density", "kinds", "load"))
        start = f"{row['case']:<21}{density:>8}{kinds:>6}{tile:>15}{load:>9}"
        if row["ms"] is None:
            lines.append(f"{start}  {row['failed'][:90]}".replace("\n", " "))
        else:
            error = "-" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(f"{start}{row['ms']:>9.2f}{row['tflops']:>9.0f}{error:>10}")
    return "\n".join(lines)


def all_rows(
    layout: TokenLayout, heads: int, head_dim: int, *, device: torch.device, groups: Sequence[str], options: Any
) -> list[dict[str, Any]]:
    """Every case of `groups` measured; which tile the later ones take depends on the sweep."""
    deadline, rows, quick = time.perf_counter() + options.budget, [], options.quick
    default = TILES[head_dim][0]

    def run(cases: Callable[[], Iterator[Case]]) -> None:
        try:
            for case in cases():
                rows.append(measured(case, device, deadline))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        except Exception as error:  # noqa: BLE001 - as in `measured`: what a group prepares may fail too
            name = getattr(cases, "__name__", "cases")
            rows.append(
                {"case": name, "tile": None, "ms": None, "failed": f"{type(error).__name__}: {str(error)[-400:]}"}
            )

    if "eight_bit" in groups:
        run(lambda: eight_bit_cases(loud(layout, heads, head_dim, device), rows))
    if set(groups) <= {"eight_bit"}:
        return rows
    problem = drawn(layout, heads, head_dim, device)
    cases: dict[str, Callable[[], Iterator[Case]]] = {
        "dense": lambda: dense_cases(problem, fa2=True),
        "band": lambda: sweep(problem, quick=quick),
        "densities": lambda: densities(problem, fastest(rows, default), quick=quick),
        "corrected": lambda: corrected_cases(problem, fastest(rows, default)),
        "refresh": lambda: refresh_cases(problem, quick=quick),
        "sums": lambda: sums_cases(problem, quick=quick),
        "dense again": lambda: dense_cases(problem, fa2=False),
        "flex": lambda: flex_cases(problem, quick=quick),
    }
    for name, group in cases.items():
        if {"densities": "band", "dense again": "dense"}.get(name, name) in groups:
            run(group)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=(16, 45, 80), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--text", type=int, default=256, help="text tokens")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--budget", type=float, default=110.0, help="seconds after which no further case starts")
    parser.add_argument("--only", nargs="+", default=GROUPS, choices=(*GROUPS, "eight_bit"), help="groups to run")
    parser.add_argument("--quick", action="store_true", help="fewer tiles, densities and kinds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args(arguments)

    import triton

    device = torch.device(options.device)
    frames, height, width = options.grid
    layout = TokenLayout(frames, height, width, options.text)
    rows = all_rows(layout, options.heads, options.head_dim, device=device, groups=tuple(options.only), options=options)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "device")}
    document = {
        "environment": environment(device) | {"triton": triton.__version__, "cudnn": torch.backends.cudnn.version()},
        "settings": settings | {"dtype": "bfloat16" if device.type == "cuda" else "float16"},
        "results": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
