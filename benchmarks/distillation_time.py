"""Seconds and memory of distilling one block of HunyuanVideo-13B, with and without its attention terms (MSAD), and with steps
that see a part of the video tokens (`method.tokens_per_step`), in one run.

    python -m benchmarks.distillation_time --output benchmarks/results/distillation_time.json

Both kinds of block, with random weights, at the tokens of a video of the given size, on whatever device there is. Per sample:
`targets` (the full-precision block, token weights' column sums, the terms' targets, head kinds), then one step of the
optimization (forward and backward of the quantized block, loss terms, optimizer). One sample and one step warm up.

The projection is for the whole model: its blocks x (samples x targets + epochs x samples x steps), with rounding, reading and
loading left out; its last column is the change to all tokens without terms.

Predicted for 57,856 tokens on an H100, without terms, before fake quantization had kernels. Operations were counted
on the meta device; attention at the 496 TFLOP/s and products at the 600 that a step of all tokens reaches. What was
left of 0.546 and 0.493 s was 0.188 and 0.135: of that 0.059 goes with the tokens, and the rest stays: fake quantization of all
weights (0.027 a 100 million of them, from the difference of both kinds), copies of the streams (0.014), norm, transform and
rotary embedding of what keys and values read (0.025). The kernels were predicted to take 0.006 of 0.12 s of a double block, and
took it to 0.40 s.

| tokens a step | attention, TFLOP | products, TFLOP | double, s | single, s | whole model, GPU-hours |
|---|---|---|---|---|---|
| all | 144.0 | 40.5 | 0.546 (measured) | 0.493 (measured) | 2.63 (measured) |
| 50 % | 72.3 | 23.9 | 0.35 | 0.29 | 1.6 |
| 25 % | 36.5 | 15.5 | 0.24 | 0.19 | 1.1 |
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

from benchmarks.harness import free_memory, gib, markdown, parser, peak_bytes, settings_of, synchronize, write_record
from benchmarks.random_model import fill_randomly, random_stream, transformer_config
from reelquant.calibration.block_call import Constants, Streams
from reelquant.calibration.block_distillation import calibrated_copy, learn, prepare_targets
from reelquant.calibration.input_groups import block_calls
from reelquant.calibration.sample import Sample
from reelquant.families.attention_core import plain_core
from reelquant.families.hunyuan_video import FAMILY
from reelquant.settings.generation import LayerBits, Numerics
from reelquant.settings.recipe import PRESETS, Recipe
from reelquant.tokens import TokenLayout
from workers.model_source import empty_block
from workers.process import deterministic_kernels, prepare_process

TERMS = ("none", "global", "local", "both")
KINDS = {"double": "transformer_blocks.0", "single": "single_transformer_blocks.0"}


def samples_of(config: dict[str, Any], layout: TokenLayout, num: int, device: torch.device) -> list[Sample]:
    """Samples in host memory, and what else their blocks read on the device, as a worker holds them."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    rope = HunyuanVideoRotaryPosEmbed(1, 1, list(config["rope_axes_dim"]), config["rope_theta"])
    rotary = rope(torch.empty(1, 1, layout.num_frames, layout.height, layout.width, device=device))
    found = []
    for index in range(num):
        stream = random_stream(layout.num_tokens, width, seed=index, device="cpu")
        noise = random_stream(layout.num_tokens, width, seed=num + index, device="cpu")
        temb = torch.randn(1, width, generator=torch.Generator().manual_seed(index)).bfloat16().to(device)
        calls = {
            "transformer_blocks": {"temb": temb, "freqs_cis": rotary},
            "single_transformer_blocks": {"temb": temb, "image_rotary_emb": rotary},
        }
        exact, drifted = (_streams(tokens, layout) for tokens in (stream, stream + 0.02 * noise))
        found.append(Sample(exact, drifted, Constants(calls, layout)))
    return found


def _streams(tokens: torch.Tensor, layout: TokenLayout) -> Streams:
    video, text = tokens[: layout.num_video], tokens[layout.num_video :]
    return {"hidden_states": video.unsqueeze(0), "encoder_hidden_states": text.unsqueeze(0)}


def measure(
    kind: str, config: dict[str, Any], layout: TokenLayout, recipe: Recipe, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of the targets of a sample and of a step, and the peak memory of both."""
    device = torch.device(options.device)
    call = block_calls(FAMILY, config)[KINDS[kind]]
    block = empty_block(config, FAMILY, call.name).to_empty(device=device).to(torch.bfloat16).requires_grad_(False)
    fill_randomly(block)
    samples = samples_of(config, layout, options.samples, device)
    for sample in samples:
        sample.lock_pages()
    free_memory(device)
    targets = []
    for sample in samples:
        begin = time.perf_counter()
        prepare_targets(call, block, [sample], recipe)
        synchronize(device)
        targets.append(time.perf_counter() - begin)
    levels = call.levels
    linears = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    modulation = {
        name for level in levels for group in level if group.stream == "conditioning" for name in group.layers
    }
    bits = {name: LayerBits(4, 16 if name in modulation else 8) for name in linears}
    copied, groups = calibrated_copy(block, levels, bits=bits, recipe=recipe, activation_amax={})
    call.set_core(copied, plain_core)
    ends = [time.perf_counter()]
    learn(
        call, copied, groups=groups, samples=samples, recipe=recipe, seed=0,
        progress=lambda *_: ends.append(time.perf_counter()),
    )  # fmt: skip
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return {
        "targets_s": statistics.median(targets[1:] or targets),
        "step_s": statistics.median(steps[1:] or steps),
        "all_targets_s": targets,
        "all_steps_s": steps,
        "peak_bytes": peak_bytes(device),
    }


def projection(rows: dict[str, dict[str, Any]], config: dict[str, Any], *, samples: int, epochs: int) -> float:
    """GPU-seconds of the distillation of all blocks."""
    num = {"double": config["num_layers"], "single": config["num_single_layers"]}
    each = {kind: float(row["targets_s"] + epochs * row["step_s"]) for kind, row in rows.items()}
    return sum(int(num[kind]) * samples * seconds for kind, seconds in each.items())


def table(document: dict[str, Any]) -> str:
    """Markdown, as measured."""
    lines = []
    for terms, fractions in document["results"].items():
        for fraction, rows in fractions.items():
            for kind, row in rows.items():
                peak = gib(row["peak_bytes"], nothing="not measured")
                times = [f"{row['targets_s']:.3f}", f"{row['step_s']:.3f}"]
                lines.append([terms, _share(fraction), kind, *times, peak])
    measured = markdown(("terms", "tokens a step", "block", "targets, s a sample", "step, s", "peak, GiB"), lines)
    projected = []
    first = document["projected_s"].get("none", {}).get("1.0")
    for terms, fractions in document["projected_s"].items():
        for fraction, seconds in fractions.items():
            more = "-" if first in (None, seconds) else f"{100 * (seconds / first - 1):+.1f} %"
            projected.append([terms, _share(fraction), f"{seconds / 3600:.2f}", more])
    head = ("terms", "tokens a step", "whole model, GPU-hours", "to none, all")
    return f"{measured}\n\n{markdown(head, projected)}"


def comparison(document: dict[str, Any]) -> str:
    """Markdown of several runs beside each other, each under its label."""
    runs = document["runs"]
    lines = []
    for label, run in runs.items():
        for fraction, rows in next(iter(run["results"].values())).items():
            double, single = rows["double"], rows["single"]
            times = [f"{double['step_s']:.3f}", f"{single['step_s']:.3f}"]
            lines.append([label, _share(fraction), *times, gib(double["peak_bytes"])])
    return markdown(("run", "tokens a step", "double block, step, s", "single block, step, s", "peak, GiB"), lines)


def _share(fraction: str) -> str:
    return "all" if float(fraction) == 1 else f"{100 * float(fraction):g} %"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__, device=True)
    given.add_argument("--frames", type=int, default=16, help="of the latents; 16 for 61 frames")
    given.add_argument("--height", type=int, default=45, help="rows of tokens; 45 for 720 pixels")
    given.add_argument("--width", type=int, default=80, help="columns of tokens; 80 for 1280 pixels")
    given.add_argument("--text", type=int, default=256, help="text tokens")
    given.add_argument("--heads", type=int, default=24)
    given.add_argument("--samples", type=int, default=2)
    given.add_argument("--epochs", type=int, default=2)
    given.add_argument("--terms", nargs="+", choices=TERMS, default=list(TERMS))
    given.add_argument(
        "--tokens-per-step", nargs="+", type=float, default=[1.0, 0.5, 0.25], help="shares of the video's"
    )
    given.add_argument("--project-samples", type=int, default=20)
    given.add_argument("--project-epochs", type=int, default=15)
    given.add_argument(
        "--deterministic", action="store_true", help="as numerics.deterministic: the same bits every time"
    )
    options = given.parse_args(arguments)
    if options.deterministic:
        prepare_process(Numerics("auto", torch.get_num_threads(), deterministic=True))
    config = transformer_config() | {"num_attention_heads": options.heads}
    layout = TokenLayout(options.frames, options.height, options.width, options.text)
    base = replace(PRESETS["s2q_quantsparse"], epochs=options.epochs)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    projected: dict[str, dict[str, float]] = {}
    for terms, fraction in itertools.product(options.terms, options.tokens_per_step):
        recipe = replace(base, attention_distillation=terms, tokens_per_step=fraction)
        with deterministic_kernels(asked=options.deterministic):
            rows = {kind: measure(kind, config, layout, recipe, options) for kind in KINDS}
        seconds = projection(rows, config, samples=options.project_samples, epochs=options.project_epochs)
        results.setdefault(terms, {})[str(fraction)] = rows
        projected.setdefault(terms, {})[str(fraction)] = seconds
    device, settings = torch.device(options.device), settings_of(options)
    print(table(write_record(options.output, device, settings, results=results, projected_s=projected)))


if __name__ == "__main__":
    main()
