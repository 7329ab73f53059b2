"""Seconds of one denoising step of HunyuanVideo-13B: bf16 as users run it, and compressed.

    python -m benchmarks.dit_step --output benchmarks/results/dit_step.json
    python -m benchmarks.dit_step --cases "ours 25 %" --merge --output benchmarks/results/dit_step.json

Random weights with outliers in the real architecture, 720 x 1280 x 61 (57,600 video tokens; 256 text tokens, 60 of them
real), batch 1, embedded guidance: one forward pass a step.

| case | what it is |
|---|---|
| `diffusers` | the transformer as it comes |
| `compiled` | the same, `compile_repeated_blocks(fullgraph=True)` |
| `strongest bf16` | compiled, text cut to its real tokens, no mask, cuDNN attention forced |
| `fp8 linears` | the strongest with `torch._scaled_mm` linears, per token and per output |
| `ours 100 %` (also with 8-bit attention) | W4A8, fused blocks, dense attention |
| `ours 15 %`, `ours 25 %` | sparse attention, a refresh every 5 steps, residual of rank 16, 8-bit rows |
| `ours 15 %, dense first 10 %`, … | the same, the first 5 of 50 steps dense (Sparse VideoGen's warm-up) |
| `ours 15 %, 8-bit attention`, … | all attention with INT8 scores and e4m3 values, refreshes in one pass |

Every step is timed alone, the device idle before and after; the triton kernels are compiled before. Of the cases whose steps
are all alike three are run, and their median is the mean. Of `ours 15 %` (16-bit and 8-bit attention) `--steps` are run: 50
is a whole schedule, and its mean is `measured`. The other sparse cases run only as many steps as show every kind of step
(dense, refresh, sparse) in two intervals; their `mean_s` weights each kind's median by how often a schedule of 50 steps has
it, and `how` says `from the steps of each kind`. After the timed steps one step of each kind is profiled.

The result is written after every case. All cases take about 14 minutes of an H100; `--merge` keeps what the output file
has of other cases, so that several calls, on the same kind of device with the same settings, fill one file.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.dit_step.kernel_table import tables
from benchmarks.dit_step.models import (
    REAL_TEXT,
    TEXT,
    UnmaskedProcessor,
    bf16_transformer,
    inputs_of,
    make_sparse,
    quantize_in_place,
    sparse_spec,
    with_fp8_linears,
)
from benchmarks.dit_step.record import CASES, MUST_AGREE, SPARSE, WHOLE, kept_results, table
from benchmarks.dit_step.schedule import MEASURED, SCHEDULE, by_kind, fewest_steps, mean_step, step_kinds
from benchmarks.dit_step.timing import Generation
from benchmarks.harness import environment, free_memory, parser, peak_bytes, write_record
from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.families.hunyuan_video import FAMILY
from reelquant.noise_schedule import shifted_levels
from reelquant.ops.band_attention.op import Precision
from reelquant.tokens import TokenLayout, band_width

REPEATS = 3
INTERVAL = 5


class Bench:
    """Runs cases on one model at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.results: dict[str, Any] = {}
        self._model: Any = None
        self._is_bf16 = False
        self._warm: set[Precision] = set()

    def run(self, case: str) -> None:
        """One case; what goes wrong is its result."""
        begin = time.perf_counter()
        try:
            found = self._cases()[case]()
            found["peak_bytes"] = peak_bytes(self.device)
        except Exception as error:  # noqa: BLE001  (the other cases go on, this one says why it did not)
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        where = environment(self.device)
        found |= {"wall_s": time.perf_counter() - begin, "commit": where["commit"], "date": where["date"]}
        self.results[case] = found
        print(case, {k: v for k, v in found.items() if not k.startswith("kernels") and k != "steps_s"}, flush=True)

    def _cases(self) -> dict[str, Callable[[], dict[str, Any]]]:
        return {
            "diffusers": lambda: self._dense(self._bf16()),
            "compiled": self._compiled,
            "strongest bf16": lambda: self._strongest(self._bf16()),
            "fp8 linears": self._fp8,
            "ours 100 %": lambda: self._ours_dense("full"),
            "ours 100 %, 8-bit attention": lambda: self._ours_dense("int8_fp8"),
            **{case: lambda case=case: self._sparse(case) for case in SPARSE},  # type: ignore[misc]
        }

    def _inputs(self, model: Any, *, padded: bool = True) -> dict[str, Any]:
        inputs = inputs_of(model, self.options.layout, text=TEXT, real_text=REAL_TEXT)
        cut = ("encoder_hidden_states", "encoder_attention_mask")
        return inputs if padded else inputs | {name: inputs[name][:, :REAL_TEXT].contiguous() for name in cut}

    def _dense(self, model: Any, *, padded: bool = True) -> dict[str, Any]:
        """All steps alike."""
        generation = Generation(model, self._inputs(model, padded=padded))
        generation.step()
        free_memory(self.device)
        seconds = [generation.step() for _ in range(REPEATS)]
        result: dict[str, Any] = {"steps_s": seconds, "mean_s": statistics.median(seconds), "how": MEASURED}
        return result | ({"kernels": generation.profiled_step()} if self.options.profile else {})

    def _ours_dense(self, precision: Precision) -> dict[str, Any]:
        model = self._ours()
        spec = sparse_spec(dict(model.config), density=1.0, dense_steps=0, interval=INTERVAL, rank=self.options.rank)
        make_sparse(model, spec, precision)
        model.sparse_attention.enabled = False
        return self._dense(model)

    def _sparse(self, case: str) -> dict[str, Any]:
        """The first steps of a schedule."""
        density, dense_steps, precision = SPARSE[case]
        model = self._ours()
        config = dict(model.config)
        spec = sparse_spec(config, density=density, dense_steps=dense_steps, interval=INTERVAL, rank=self.options.rank)
        inputs = self._inputs(model)
        self._warm_up(model, inputs, spec, precision)
        make_sparse(model, spec, precision)
        free_memory(self.device)
        generation = Generation(model, inputs)
        num = self.options.steps if case in WHOLE else fewest_steps(spec)
        seconds = [generation.step() for _ in range(num)]
        mean, how = mean_step(seconds, spec)
        frames, rows, columns = self.options.layout
        layout = TokenLayout(frames, rows, columns, REAL_TEXT)
        result: dict[str, Any] = {
            "steps_s": seconds,
            "kinds": step_kinds(spec, num),
            "by_kind_s": by_kind(seconds, spec),
            "mean_s": mean,
            "how": how,
            "density": density,
            "dense_steps": dense_steps,
            "effective_density": spec.effective_density(
                layout,
                band_width(layout, density),
                noise_levels=shifted_levels(SCHEDULE),
                blocks=FAMILY.block_names(config),
            ),
        }
        return result | (self._sparse_kernels(generation, spec) if self.options.profile else {})

    def _sparse_kernels(self, generation: Generation, spec: SparseAttentionSpec) -> dict[str, Any]:
        """Of the next refresh and of the next sparse step of a generation that has seen two refreshes."""
        kinds = step_kinds(spec, generation.steps + spec.interval + 1)
        found: dict[str, Any] = {}
        while len(found) < 2:
            kind = kinds[generation.steps]
            name = "kernels_of_a_refresh" if kind == "refresh" else "kernels_of_a_sparse_step"
            if name in found:
                generation.step()
            else:
                found[name] = generation.profiled_step()
        return found

    def _warm_up(self, model: Any, inputs: dict[str, Any], spec: SparseAttentionSpec, precision: Precision) -> None:
        """Every kind of step once, for all sparse cases of a precision: their kernels are compiled for all densities."""
        if precision not in self._warm:
            make_sparse(model, replace(spec, dense_above=1.0, interval=2), precision)
            generation = Generation(model, inputs)
            for _ in range(4):
                generation.step()
            self._warm.add(precision)

    def _compiled(self) -> dict[str, Any]:
        model = self._bf16()
        model.compile_repeated_blocks(fullgraph=True)
        try:
            return self._dense(model)
        finally:
            _uncompile(model)

    def _strongest(self, model: Any) -> dict[str, Any]:
        before = model.attn_processors
        model.set_attn_processor(
            {name: UnmaskedProcessor() if "refiner" not in name else processor for name, processor in before.items()}
        )
        model.compile_repeated_blocks(fullgraph=True)
        try:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
                return self._dense(model, padded=False)
        finally:
            _uncompile(model)
            model.set_attn_processor(before)

    def _fp8(self) -> dict[str, Any]:
        """Replaces the linears of the blocks, for good."""
        model = with_fp8_linears(self._bf16())
        self._is_bf16 = False
        self._collect()
        return self._strongest(model)

    def _bf16(self) -> Any:
        if not self._is_bf16:
            self._model = None
            self._collect()
            changes = {"num_layers": self.options.double, "num_single_layers": self.options.single}
            self._model = bf16_transformer(changes, self.device)
            self._is_bf16 = True
        return self._model

    def _ours(self) -> Any:
        if not hasattr(self._model, "block_fusion"):
            quantize_in_place(self._bf16(), weight_bits=self.options.weight_bits, activation_bits=8)
            self._model.block_fusion.mode = "on"
            self._is_bf16 = False
            self._collect()
        return self._model

    def _collect(self) -> None:
        gc.collect()
        free_memory(self.device)


def _uncompile(model: Any) -> None:
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__)
    given.add_argument("--layout", type=int, nargs=3, default=[16, 45, 80], help="tokens: frames, rows, columns")
    given.add_argument("--double", type=int, default=20, help="double-stream blocks")
    given.add_argument("--single", type=int, default=40, help="single-stream blocks")
    given.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    given.add_argument(
        "--steps",
        type=int,
        default=SCHEDULE,
        help=f"of {' and '.join(WHOLE)}; at least {2 * INTERVAL}".replace("%", "%%"),
    )
    given.add_argument("--rank", type=int, default=16)
    given.add_argument("--weight-bits", type=int, default=4)
    given.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True)
    given.add_argument("--merge", action="store_true", help="keep what the output file has of other cases")
    given.add_argument("--device", default="cuda", help="cpu, with a small model, shows that the script works")
    options = given.parse_args(arguments)
    if options.steps < 2 * INTERVAL:
        given.error(f"--steps is {options.steps}: every kind of step is seen from {2 * INTERVAL} on")
    bench = Bench(options)
    where = environment(bench.device)
    settings = {name: getattr(options, name) for name in (*MUST_AGREE, "profile")}
    if options.merge:
        bench.results = kept_results(options.output, where["device"], settings)
    for case in options.cases:
        bench.run(case)
        document = write_record(options.output, where, settings, results=bench.results)
    print(table(document))
    print(tables(document))


if __name__ == "__main__":
    main()
