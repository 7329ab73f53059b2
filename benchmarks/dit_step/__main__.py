"""Seconds of one denoising step of HunyuanVideo-13B, in one run and one process: bf16 as users run it, and compressed.

    python -m benchmarks.dit_step --output benchmarks/results/dit_step.json

Random weights with outliers in the real architecture, 720 x 1280 x 61 (57,600 video tokens; 256 text tokens, 60 of them
real), batch 1, embedded guidance: one forward pass a step.

| case | what it is |
|---|---|
| `diffusers` | the transformer as it comes |
| `compiled` | the same, `compile_repeated_blocks(fullgraph=True)` |
| `strongest bf16` | compiled, text cut to its real tokens, no mask, cuDNN attention forced |
| `fp8 linears` | the strongest with `torch._scaled_mm` linears, per token and per output |
| `ours 100 %` | W4A8, fused blocks, dense attention |
| `ours 25 %`, `ours 15 %` | sparse attention, a refresh every 5 steps, residual of rank 16, no dense first steps |

Steps are timed one by one with the device idle before and after; the mean of a 50-step schedule is that of its steps, for
cases shorter than it that of their refresh and sparse steps (the first refresh, which has no change to keep, left out).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_memory import environment
from benchmarks.dit_step.models import (
    UnmaskedProcessor,
    bf16_transformer,
    inputs_of,
    make_sparse,
    quantize_in_place,
    with_fp8_linears,
)

CASES = ("diffusers", "compiled", "strongest bf16", "fp8 linears", "ours 100 %", "ours 25 %", "ours 15 %")
SCHEDULE = 50
INTERVAL = 5


def timed_steps(model: Any, inputs: dict[str, Any], num: int, *, warm_up: int = 1) -> list[float]:
    """Seconds of `num` consecutive steps of one generation, after `warm_up` steps of another."""
    for count in (warm_up, num):
        conditioning = inputs["encoder_hidden_states"].clone()  # its identity is the generation's
        seconds = []
        for step in range(count):
            timestep = torch.tensor([1000.0 - 15 * step], device=model.device)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            with torch.no_grad():
                model(timestep=timestep, **{**inputs, "encoder_hidden_states": conditioning})
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    return seconds


def kernel_times(model: Any, inputs: dict[str, Any], skip: int) -> list[dict[str, Any]]:
    """Device time by kernel of the step after `skip` others, largest first."""
    conditioning = inputs["encoder_hidden_states"].clone()
    with torch.no_grad():
        for step in range(skip + 1):
            arguments = {**inputs, "encoder_hidden_states": conditioning}
            timestep = torch.tensor([1000.0 - 15 * step], device=model.device)
            if step < skip:
                model(timestep=timestep, **arguments)
                continue
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                model(timestep=timestep, **arguments)
                torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in events)
    events.sort(key=lambda event: -event.self_device_time_total)
    return [
        {
            "kernel": event.key[:120],
            "calls": event.count,
            "ms": event.self_device_time_total / 1e3,
            "share": event.self_device_time_total / total,
        }
        for event in events[:25]
    ]


def sparse_case(model: Any, inputs: dict[str, Any], density: float, options: argparse.Namespace) -> dict[str, Any]:
    """A schedule with refreshes."""
    make_sparse(model, density=density, interval=INTERVAL, dense_steps=0, rank=options.rank)
    num = options.steps if density == options.densities[0] else min(options.steps, 2 * INTERVAL + 1)
    torch.cuda.reset_peak_memory_stats()
    seconds = timed_steps(model, inputs, num, warm_up=2)
    refresh = seconds[INTERVAL::INTERVAL] or seconds[:1]
    sparse = [s for step, s in enumerate(seconds) if step % INTERVAL]
    expected = (statistics.fmean(refresh) + (INTERVAL - 1) * statistics.fmean(sparse)) / INTERVAL
    result: dict[str, Any] = {
        "steps_s": seconds,
        "refresh_s": statistics.median(refresh),
        "sparse_s": statistics.median(sparse),
        "mean_s": statistics.fmean(seconds) if num == SCHEDULE else expected,
        "effective_density": model.sparse_attention.visited.density,
    }
    if options.profile:
        result["kernels_of_a_sparse_step"] = kernel_times(model, inputs, 1)
        result["kernels_of_a_refresh"] = kernel_times(model, inputs, INTERVAL)
    return result


def dense_case(model: Any, inputs: dict[str, Any], options: argparse.Namespace, *, repeats: int) -> dict[str, Any]:
    """All steps alike."""
    torch.cuda.reset_peak_memory_stats()
    seconds = timed_steps(model, inputs, repeats)
    result: dict[str, Any] = {"steps_s": seconds, "mean_s": statistics.median(seconds)}
    if options.profile:
        result["kernels"] = kernel_times(model, inputs, 0)
    return result


class Bench:
    """Runs the cases in order on one model, which they change on the way."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda")
        changes = {"num_layers": options.double, "num_single_layers": options.single}
        self.model = bf16_transformer(changes, self.device)
        self.padded = inputs_of(self.model, options.layout, text=256, real_text=60)
        cut = self.padded["encoder_hidden_states"][:, :60].contiguous()
        self.trimmed = self.padded | {
            "encoder_hidden_states": cut,
            "encoder_attention_mask": self.padded["encoder_attention_mask"][:, :60].contiguous(),
        }
        self.results: dict[str, Any] = {}
        self.quantized = False

    def run(self, case: str) -> None:
        """One case; what goes wrong is its result."""
        begin = time.perf_counter()
        try:
            found = self._cases()[case]()
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        except Exception as error:  # noqa: BLE001  (the other cases go on, this one says why it did not)
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        found["wall_s"] = time.perf_counter() - begin
        self.results[case] = found
        print(case, {k: v for k, v in found.items() if not k.startswith("kernels") and k != "steps_s"}, flush=True)

    def _cases(self) -> dict[str, Callable[[], dict[str, Any]]]:
        return {
            "diffusers": lambda: dense_case(self.model, self.padded, self.options, repeats=2),
            "compiled": self._compiled,
            "strongest bf16": self._strongest,
            "fp8 linears": self._fp8,
            "ours 100 %": lambda: dense_case(self._ours(), self.padded, self.options, repeats=3),
            "ours 25 %": lambda: sparse_case(self._ours(), self.padded, 0.25, self.options),
            "ours 15 %": lambda: sparse_case(self._ours(), self.padded, 0.15, self.options),
        }

    def _compiled(self) -> dict[str, Any]:
        self.model.compile_repeated_blocks(fullgraph=True)
        try:
            return dense_case(self.model, self.padded, self.options, repeats=3)
        finally:
            self._uncompile()

    def _strongest(self) -> dict[str, Any]:
        before = self.model.attn_processors
        self.model.set_attn_processor(
            {name: UnmaskedProcessor() if "refiner" not in name else processor for name, processor in before.items()}
        )
        self.model.compile_repeated_blocks(fullgraph=True)
        try:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
                return dense_case(self.model, self.trimmed, self.options, repeats=3)
        finally:
            self._uncompile()
            self.model.set_attn_processor(before)

    def _fp8(self) -> dict[str, Any]:
        """A copy of the token-wise linears; the bf16 ones come back from the seed afterwards."""
        changes = {"num_layers": self.options.double, "num_single_layers": self.options.single}
        self.model = with_fp8_linears(self.model)
        gc.collect()
        torch.cuda.empty_cache()
        try:
            return self._strongest()
        finally:
            self.model = None
            gc.collect()
            torch.cuda.empty_cache()
            self.model = bf16_transformer(changes, self.device)

    def _uncompile(self) -> None:
        for module in self.model.modules():
            module._compiled_call_impl = None
        torch._dynamo.reset()

    def _ours(self) -> Any:
        if not self.quantized:
            quantize_in_place(self.model, weight_bits=self.options.weight_bits, activation_bits=8)
            self.model.block_fusion.mode = "on"
            self.quantized = True
            gc.collect()
            torch.cuda.empty_cache()
        return self.model


def table(document: dict[str, Any]) -> str:
    """Markdown: every case against the two baselines."""
    results = document["results"]
    lines = [
        "| case | mean step, s | refresh, s | sparse, s | peak, GiB | to diffusers | to strongest bf16 |",
        "|" + "---|" * 7,
    ]
    for name, row in results.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error'][:80]} | | | | | |")
            continue
        cells = [f"{row['mean_s']:.3f}"]
        cells += [f"{row[key]:.3f}" if key in row else "-" for key in ("refresh_s", "sparse_s")]
        cells.append(f"{row['peak_bytes'] / 2**30:.1f}")
        for base in ("diffusers", "strongest bf16"):
            mean = results.get(base, {}).get("mean_s")
            cells.append(f"{mean / row['mean_s']:.2f}×" if mean else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", type=int, nargs=3, default=[16, 45, 80], help="tokens: frames, rows, columns")
    parser.add_argument("--double", type=int, default=20, help="double-stream blocks")
    parser.add_argument("--single", type=int, default=40, help="single-stream blocks")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=SCHEDULE, help="of the first density's schedule; others take 11")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.15])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args(arguments)
    options.layout = tuple(options.layout)
    bench = Bench(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    for case in options.cases:
        bench.run(case)
        document = {"environment": environment(bench.device), "settings": settings, "results": bench.results}
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document))


if __name__ == "__main__":
    main()
