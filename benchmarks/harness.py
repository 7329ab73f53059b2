"""Command line, environment, timing, record and tables of all benchmarks.

A benchmark is a script with `main(arguments)`: it parses a command line made by `parser`, measures, and leaves a JSON file by
`write_record`: environment, settings and figures. Tables of the documentation are made from these files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipeline.provenance import commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
L2_BYTES = 128 * 2**20
"""Bytes that the buffers of a graph must exceed together: more than twice the L2 cache of an H100."""

Row = dict[str, Any]


def parser(text: str | None, *, device: bool = False) -> argparse.ArgumentParser:
    """A command line with `--output`, and with `--device` if asked for.

    Args:
        text: the script's docstring.
    """
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    if device:
        found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return found


def settings_of(options: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """The options that decide a result."""
    return {name: value for name, value in vars(options).items() if name not in ("output", "device", *left_out)}


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    cuda = device.type == "cuda"
    cpu = f"cpu {platform.machine()}, threads: {torch.get_num_threads()}"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if cuda else cpu,
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def write_json(path: Path, document: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Writes a document, with its folder, in place of what is there; a run that is killed meanwhile leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=indent) + "\n", encoding="utf-8")
    partial.replace(path)


def write_record(
    path: Path, where: torch.device | Mapping[str, Any], settings: Mapping[str, Any], **figures: Any
) -> dict[str, Any]:
    """Writes a record and returns it.

    Args:
        where: the environment, or the device whose environment it is.
        figures: by the record's key, such as `results` or `rows`.
    """
    found = environment(where) if isinstance(where, torch.device) else where
    document = {"environment": found, "settings": settings, **figures}
    write_json(path, document)
    return document


def read_record(path: Path) -> dict[str, Any]:
    """The document of a JSON file."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; a CPU never lags behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Returns unused memory to a GPU and begins its peak anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory that was allocated on a GPU since `free_memory`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def repeated(call: Callable[[], object], device: torch.device, repeats: int) -> Row:
    """Seconds of every run after one that warms up, and the peak of all in bytes above the memory allocated before (None on a
    CPU)."""
    call()
    seconds, peaks = [], []
    for _ in range(repeats):
        synchronize(device)
        before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        begin = time.perf_counter()
        result = call()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
        peaks.append((peak_bytes(device) or 0) - before)
        del result
    spread = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "all_s": seconds}
    return {"peak_bytes": max(peaks) if device.type == "cuda" else None, **spread}


def timed(call: Callable[[], object], device: torch.device) -> Row:
    """Milliseconds: median, and the 20th and 80th percentile, the L2 cache flushed before each run. On a CPU of one run."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return dict.fromkeys(("ms", "ms_20", "ms_80"), 1e3 * (time.perf_counter() - begin))
    from triton.testing import do_bench

    median, low, high = do_bench(call, warmup=30, rep=120, quantiles=[0.5, 0.2, 0.8])
    return {"ms": median, "ms_20": low, "ms_80": high}


def timed_in_graph(calls: Sequence[Callable[[], object]], device: torch.device) -> Row:
    """Milliseconds of one of `calls`, which run one after the other in a CUDA graph: for kernels shorter than a launch."""
    if device.type != "cuda":
        return timed(calls[0], device)
    from triton.testing import do_bench_cudagraph

    median, low, high = do_bench_cudagraph(lambda: [call() for call in calls], rep=30, quantiles=[0.5, 0.2, 0.8])
    return {"ms": median / len(calls), "ms_20": low / len(calls), "ms_80": high / len(calls)}


class Recorder:
    """Measures calls until the time is up, and keeps one row for each, whatever becomes of it."""

    def __init__(self, budget_s: float) -> None:
        self.begin = time.monotonic()
        self.budget_s = budget_s
        self.rows: list[Row] = []

    def add(self, head: Mapping[str, Any], call: Callable[[], Row]) -> Row:
        """`call` returns the figures of the row that begins with `head`; its exception becomes the row's error."""
        row: Row = dict(head)
        begin = time.monotonic()
        if begin > self.begin + self.budget_s:
            row["skipped"] = f"the {self.budget_s:.0f} s of --budget were up"
        else:
            try:
                row |= call()
            except Exception as error:  # noqa: BLE001  one case must not end the run
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            row["spent_s"] = round(time.monotonic() - begin, 2)
        self.rows.append(row)
        print({key: value for key, value in row.items() if key != "config"}, file=sys.stderr, flush=True)
        return row


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def gib(num_bytes: int | None, digits: int = 1, *, nothing: str = "-") -> str:
    """Bytes in GiB."""
    return f"{num_bytes / 2**30:.{digits}f}" if num_bytes else nothing


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


def visible_gpus(num: int) -> list[str]:
    """The first `num` GPUs that this process may use, each as `CUDA_VISIBLE_DEVICES` names it.

    Raises: SystemExit where there are fewer.
    """
    found = torch.cuda.device_count()
    if found < num:
        raise SystemExit(f"{num} GPUs are asked for, {found} may be used here (CUDA_VISIBLE_DEVICES counts)")
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (listed.split(",") if listed else [str(index) for index in range(found)])[:num]
