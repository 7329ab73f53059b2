"""Speed of the kernels around the quantized linear layers, beside the card's ceilings and torch's own products, in one run.

    python -m benchmarks.linear_kernels --output benchmarks/results/linear_kernels.json

At the sizes of HunyuanVideo at 720 x 1280, 61 frames (57,600 video tokens, 256 text tokens, width 3072), on a CUDA GPU:

- ceilings: a device copy (bytes read and written) and a bf16 product of 8192^3,
- ``linear``: the six products of a block with what follows them, over tile configurations, beside bf16 `torch.mm`,
  `torch._int_mm` (int32 out) and `torch._scaled_mm` (fp8, row-wise scales), which compute the product alone,
- ``text``: products of the text stream, 60 and 256 tokens, rated by the bytes of the weight,
- ``expansion``: stored weights to INT8; ``input``: norm to codes; ``qk``: norm and rotary embedding of q and k,
- ``fake``: fake quantization of a learning step, forward and both ways, beside torch; bytes are those of the kernels.

Codes come from Gaussian data with loud channels, 8 bits, and Gaussian weights at 4 bits in two levels: a card at its power
limit is faster on zeros. Medians of `triton.testing.do_bench` (L2 flushed); small launches as CUDA graphs over buffers that
together exceed L2. Whatever fails is recorded with its error, and the rest goes on. After `--budget` seconds what is left is
recorded as skipped: the defaults of all parts come first, then the alternatives.

Predicted on an H100 (3.0 TB/s copy, 780 TFLOP/s bf16): linear 1100-1200 TOPS, expansion and qk 80-90 % of the copy, input
with norm 0.20-0.25 ms (floor 0.178). fake, both ways: 0.6 ms for 3072, 2.4 ms for 12,288, 0.25 ms for a weight.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from benchmarks.attention_memory import environment, import_without_diffusers
from benchmarks.kernel_timing import L2_BYTES, Recorder, Row, ceilings, moved, rated, table, timed, timed_in_graph

VIDEO, TEXT, WIDTH, HEADS, HEAD_DIM = 57_600, 256, 3072, 24, 128
JOINT = VIDEO + TEXT
# Tokens, inputs, launches (outputs and epilogue). The single block's two products read one input and write two buffers.
LINEAR: dict[str, tuple[int, int, list[tuple[int, str]]]] = {
    "double qkv": (VIDEO, WIDTH, [(3 * WIDTH, "bias")]),
    "double out": (VIDEO, WIDTH, [(WIDTH, "residual")]),
    "double fc1": (VIDEO, WIDTH, [(4 * WIDTH, "gelu")]),
    "double fc2": (VIDEO, 4 * WIDTH, [(WIDTH, "residual")]),
    "single in": (JOINT, WIDTH, [(3 * WIDTH, "bias"), (4 * WIDTH, "gelu")]),
    "single out": (JOINT, 5 * WIDTH, [(WIDTH, "residual")]),
}
QUICK = ("double qkv", "double out", "double fc1")
TEXT_SHAPES = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
WEIGHTS = [(WIDTH, WIDTH), (3 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH, 5 * WIDTH), (7 * WIDTH, WIDTH)]


def loud(num_tokens: int, d: int) -> Tensor:
    """bf16 Gaussian activations, every 128th channel ten times as loud."""
    x = torch.randn(num_tokens, d, device="cuda", dtype=torch.bfloat16)
    x[:, ::128] *= 10
    return x


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of 8 bits."""
    from reelquant.ops.input_quantization.reference import quantize_input_reference

    return quantize_input_reference(x, bits=8, channel_scale=None, rotation=None, clip=None, norm=None)


def weight_of(n: int, d: int) -> tuple[Tensor, Tensor]:
    """INT8 weight of 4-bit codes in two levels, and its scale."""
    from reelquant.quantization.weight_grid import fit_two_level

    weight = torch.randn(n, d, device="cuda") / d**0.5
    grid = fit_two_level(weight, 4)
    return grid.expand(grid.round(weight)), grid.scale[:, 0].contiguous()


def linear(record: Recorder, ceiling: float, *, alternatives: bool, quick: bool) -> None:
    """The six products: the default beside torch, or the alternatives."""
    from reelquant.ops.int8_linear.launch import LARGE, Config

    deep = replace(LARGE, block_k=256, num_stages=2, split=4)
    configs: dict[str, Config | None] = {
        "128x256x256, 2 stages": deep,
        "128x256x256, 2 stages, not flattened": replace(deep, flatten=False),
        "128x256, 4 stages, split 4": replace(LARGE, num_stages=4, split=4),
        "128x256, not flattened": replace(LARGE, flatten=False),
        "128x256, one tile a program": replace(LARGE, persistent=False),
        "256x128x256, 2 stages": replace(deep, block_m=256, block_n=128),
        "128x256, group 16": replace(LARGE, group=16),
    }
    for name in QUICK if quick else LINEAR:
        num_tokens, d, launches = LINEAR[name]
        x = loud(num_tokens, d)
        operands = [(*weight_of(n, d), epilogue) for n, epilogue in launches]
        operations = 2.0 * num_tokens * d * sum(n for n, _ in launches)
        codes, scale = codes_of(x)
        if not alternatives:
            measured: dict[str, Callable[[], Row]] = {
                "default": partial(one_linear, codes, scale, operands, None),
                **torch_products(x, codes, torch.cat([weight for weight, *_ in operands])),
            }
        else:
            measured = {variant: partial(one_linear, codes, scale, operands, c) for variant, c in configs.items()}
        for variant, row in measured.items():
            record.add("linear", name, variant, lambda r=row, o=operations: rated(r(), o, ceiling))  # type: ignore[misc]
        del x, measured
        torch.cuda.empty_cache()


def one_linear(codes: Tensor, scale: Tensor, operands: list[tuple[Tensor, Tensor, str]], config: Any) -> Row:
    """All launches of a case together, checked against float64 on rows from both ends."""
    from reelquant.ops.architecture import architecture
    from reelquant.ops.int8_linear.launch import choose_config, launch_int8_linear

    calls, worst = [], 0.0
    rows = torch.cat([torch.arange(70), torch.arange(len(codes) - 70, len(codes))]).cuda()
    for weight, weight_scale, epilogue in operands:
        n = len(weight)
        out = torch.full((len(codes), n), float("nan"), device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        gate = torch.randn(n, device="cuda") if epilogue == "residual" else None
        residual = torch.randn_like(out) if epilogue == "residual" else None
        activation = "gelu_tanh" if epilogue == "gelu" else None
        others = {"activation": activation, "gate": gate, "residual": residual, "out": out, "config": config}
        calls.append(partial(launch_int8_linear, codes, scale, weight, weight_scale, bias, **others))
        calls[-1]()
        y = codes[rows].double() @ weight.double().T * scale[rows, None].double() * weight_scale.double() + bias
        y = gelu(y, approximate="tanh") if activation else y
        y = y if gate is None or residual is None else residual[rows].double() + gate * y
        worst = max(worst, float((out[rows].double() - y).norm() / y.norm()))
    count = architecture(codes.device).num_multiprocessors
    used = config or choose_config(len(codes), len(operands[0][0]), num_multiprocessors=count)
    return {**timed(lambda: [call() for call in calls]), "relative_error": worst, "config": asdict(used)}


def torch_products(x: Tensor, codes: Tensor, weight: Tensor) -> dict[str, Callable[[], Row]]:
    """torch's own products of these sizes, without epilogue."""
    half = weight.bfloat16()

    def row_wise() -> Row:
        a, b = x.to(torch.float8_e4m3fn), (half / 16).to(torch.float8_e4m3fn)
        scales = torch.rand(len(x), 1, device="cuda") + 0.5, torch.rand(1, len(weight), device="cuda") + 0.5
        return timed(partial(torch._scaled_mm, a, b.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True))

    return {
        "bf16 torch.mm": lambda: timed(lambda: torch.mm(x, half.T)),
        "_int_mm": lambda: timed(lambda: torch._int_mm(codes, weight.T)),
        "fp8 _scaled_mm": row_wise,
    }


def text(record: Recorder, ceiling: float, *, alternatives: bool, quick: bool) -> None:
    """Products of few tokens."""
    from reelquant.ops.int8_linear.launch import SMALL, Config, launch_int8_linear

    configs: dict[str, Config | None] = {
        "64x64x128": Config(64, 64, 128, 4, 5, persistent=False),
        "64x32x128": replace(SMALL, block_k=128, num_stages=6),
        "64x64x256": replace(SMALL, block_n=64),
        "128x64x128": Config(128, 64, 128, 4, 4, persistent=False),
    }

    def ours(x: Tensor, weight: tuple[Tensor, Tensor], config: Config | None) -> Row:
        codes, scale = codes_of(x)
        out = torch.empty(len(x), len(weight[0]), device="cuda", dtype=torch.bfloat16)
        others: dict[str, Any] = {"activation": None, "gate": None, "residual": None, "out": out, "config": config}
        calls = [
            partial(launch_int8_linear, codes, scale, copy, weight[1], None, **others) for copy in copies_of(weight[0])
        ]
        return moved(timed_in_graph(calls), weight[0].nbytes, ceiling)

    def theirs(x: Tensor, weight: Tensor) -> Row:
        calls = [partial(torch.mm, x, copy.T) for copy in copies_of(weight)]
        return moved(timed_in_graph(calls), weight.nbytes, ceiling)

    for d, n in TEXT_SHAPES[:2] if quick else TEXT_SHAPES:
        weight = weight_of(n, d)
        for num_tokens in (60, TEXT):
            x = loud(num_tokens, d)
            case = f"{num_tokens} tokens {d} -> {n}"
            for variant, config in (configs if alternatives else {"default": None}).items():
                record.add("text", case, variant, partial(ours, x, weight, config))
            if not alternatives:
                record.add("text", case, "bf16 torch.mm", partial(theirs, x, weight[0].bfloat16()))


def copies_of(weight: Tensor) -> list[Tensor]:
    """So many that L2 does not hold them."""
    return [weight.clone() for _ in range(1 + L2_BYTES // weight.nbytes)]


def expansion(record: Recorder, ceiling: float, *, alternatives: bool, quick: bool) -> None:
    """Stored weights to INT8."""
    from reelquant.ops.weight_expansion.kernel import launch_expand_weight
    from reelquant.ops.weight_expansion.reference import expand_weight_reference

    sizes: dict[str, dict[str, int]] = {
        "256 units": {"block": 256},
        "1024 units, 8 warps": {"block": 1024, "num_warps": 8},
        "128 units": {"block": 128},
    }

    def measure(bits: int, n: int, d: int, options: dict[str, int]) -> Row:
        packed = torch.randint(0, 256, (n, d // 8 * bits), device="cuda", dtype=torch.uint8)
        scale = torch.randint(1, 5, (n, d // 64), device="cuda", dtype=torch.uint8)
        outs = [torch.full((n, d), 99, device="cuda", dtype=torch.int8) for _ in range(1 + L2_BYTES // (n * d))]
        calls: list[Callable[[], object]] = [
            partial(launch_expand_weight, packed.clone(), bits=bits, group_scale=scale, out=out, **options)
            for out in outs
        ]
        figures = moved(timed_in_graph(calls), packed.nbytes + scale.nbytes + n * d, ceiling)
        expected = expand_weight_reference(packed, bits=bits, group_scale=scale, out=torch.empty_like(outs[0]))
        return {**figures, "exact": all(torch.equal(out, expected) for out in outs)}

    for bits in (4, 6):
        for n, d in WEIGHTS[:2] if quick else WEIGHTS:
            for variant, options in (sizes if alternatives else {"default": {}}).items():
                record.add("expansion", f"{bits} bits {n}x{d}", variant, partial(measure, bits, n, d, options))


def inputs(record: Recorder, ceiling: float, *, alternatives: bool, quick: bool) -> None:
    """From norm to codes."""
    from reelquant.ops.input_quantization.kernel import Config, launch_quantize_input
    from reelquant.ops.input_quantization.op import Norm
    from reelquant.ops.input_quantization.reference import quantize_input_reference
    from reelquant.quantization.rotation import hadamard

    # Tokens x blocks of a piece, warps x programs of a multiprocessor.
    narrow: dict[str, Config | None] = {
        "2x32, 4 warps x 3": Config(2, 32, 4, 3, 168),
        "2x32, 4 warps x 4": Config(2, 32, 4, 4, 128),
        "8x8, 16 warps": Config(8, 8, 16, 1, 128),
        "8x8, 16 warps, prefetch": Config(8, 8, 16, 1, 128, prefetch=True),
        "8x8, 8 warps": Config(8, 8, 8, 1),
    }
    wide: dict[str, Config | None] = {
        "1x64, 8 warps, prefetch": Config(1, 64, 8, 1, prefetch=True),
        "1x64, 16 warps": Config(1, 64, 16, 1, 128),
        "1x64, 16 warps, prefetch": Config(1, 64, 16, 1, 128, prefetch=True),
    }
    plain: dict[str, Config | None] = {
        "4x8, 8 warps x 2": Config(4, 8, 8, 2, 128),
        "4x8, 4 warps x 2": Config(4, 8, 4, 2),
        "2x8, 4 warps x 3, prefetch": Config(2, 8, 4, 3, 168, prefetch=True),
        "2x8, 8 warps x 3": Config(2, 8, 8, 3, 80),
    }

    def measure(x: Tensor, others: dict[str, Any], config: Config | None) -> Row:
        codes, scale = launch_quantize_input(x, **others, config=config)
        rows = slice(len(x) - 600, None)
        expected, expected_scale = quantize_input_reference(x[rows], **others)
        beside = (codes[rows].int() - expected.int()).abs()
        times = timed(lambda: launch_quantize_input(x, **others, config=config))
        return {
            **moved(times, x.nbytes + codes.nbytes + scale.nbytes, ceiling),
            "codes_beside": float((beside > 0).float().mean()),
            "largest_difference": int(beside.max()),
            "relative_error": float((scale[rows] / expected_scale - 1).abs().max()),
        }

    for d, rotated in ((WIDTH, True), (4 * WIDTH, True), (5 * WIDTH, True), (WIDTH, False)):
        if quick and d != WIDTH:
            continue
        x = loud(JOINT, d)
        norm = Norm(1e-6, 1 + 0.3 * torch.randn(d, device="cuda"), 0.2 * torch.randn(d, device="cuda"))
        others: dict[str, Any] = {
            "bits": 8,
            "channel_scale": torch.rand(d, device="cuda") + 0.5,
            "rotation": hadamard(128).bfloat16().cuda() if rotated else None,
            "clip": torch.tensor([0.95], device="cuda"),
            "norm": norm if d == WIDTH else None,
        }
        case = f"{d}{', norm' if d == WIDTH else ''}{', rotation 128' if rotated else ''}"
        variants = (plain if not rotated else narrow if d == WIDTH else wide) if alternatives else {"default": None}
        for variant, config in variants.items():
            record.add("input", case, variant, partial(measure, x, others, config))


def qk(record: Recorder, ceiling: float, *, alternatives: bool, quick: bool) -> None:
    """Norm and rotary embedding of q and k in a buffer of q, k and v."""
    from reelquant.ops.qk_norm_rope.kernel import launch_qk_norm_rope
    from reelquant.ops.qk_norm_rope.reference import qk_norm_rope_reference

    qkv = loud(JOINT, 3 * WIDTH)
    angles = (100 * torch.rand(VIDEO, HEAD_DIM // 2, device="cuda")).repeat_interleave(2, dim=1)
    weights = [1 + 0.3 * torch.randn(HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    others: dict[str, Any] = {
        "num_heads": HEADS,
        "norm_weights": tuple(weights[:2]),
        "text_norm_weights": tuple(weights[2:]),
        "rotary": (angles.cos(), angles.sin()),
        "eps": 1e-6,
    }
    expected = qk_norm_rope_reference(qkv.clone(), **others)[:, : 2 * WIDTH].float()
    num_bytes = 2 * (2 * JOINT * WIDTH * 2) + 2 * VIDEO * HEAD_DIM * 4

    def measure(options: dict[str, Any]) -> Row:
        found = launch_qk_norm_rope(qkv.clone(), **others, **options)
        error = float((found[:, : 2 * WIDTH].float() - expected).norm() / expected.norm())
        # In place, again and again: what is normalized keeps its size.
        times = timed(lambda: launch_qk_norm_rope(found, **others, **options))
        return {**moved(times, num_bytes, ceiling), "relative_error": error}

    sizes = [(8, 4, 1), (4, 4, 1), (16, 8, 1), (16, 4, 3), (8, 4, 3), (32, 8, 1)]
    case = f"{JOINT} tokens, {HEADS} x {HEAD_DIM}"
    if not alternatives:
        record.add("qk", case, "default", partial(measure, {}))
    for tokens, num_warps, num_stages in sizes[: 2 if quick else None] if alternatives else ():
        options = {"tokens": tokens, "num_warps": num_warps, "num_stages": num_stages}
        record.add("qk", case, f"{tokens} tokens, {num_warps} warps, {num_stages} stages", partial(measure, options))


def fakes(record: Recorder, ceiling: float, *, alternatives: bool, quick: bool) -> None:
    """Fake quantization with gradients."""
    from reelquant.ops.implementation import reference_only
    from reelquant.quantization.quantizer import fake_quantize
    from reelquant.quantization.weight_grid import fake_quantize_weight

    def measure(x: Tensor, run: Callable[[Tensor, Tensor], Tensor], *, both: bool, kernels: bool) -> Row:
        clip = torch.full((1,) if x.dtype == torch.bfloat16 else (len(x), 1), 0.9, device="cuda")
        learned, grad = [x.requires_grad_(), clip.requires_grad_()], torch.randn_like(x)

        def call() -> tuple[Tensor, ...]:
            out = run(x, clip)
            return torch.autograd.grad(out, learned, grad) if both else (out.detach(),)

        with reference_only():
            expected = call()
        with nullcontext() if kernels else reference_only():
            errors = [
                float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(call(), expected, strict=True)
            ]
            times = timed(call)
        return {**moved(times, x.nbytes * (5 if both else 2), ceiling), "relative_error": max(errors)}

    runs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "rows": lambda x, clip: fake_quantize(x, 6, -1, clip),
        "two levels": lambda x, clip: fake_quantize_weight(x, 4, clip, "two_level"),
    }
    cases = [("rows", JOINT, WIDTH), ("rows", JOINT, 4 * WIDTH), ("two levels", 4 * WIDTH, WIDTH)]
    for kind, rows, d in () if alternatives else cases[:1] if quick else cases:
        x = loud(rows, d) if kind == "rows" else torch.randn(rows, d, device="cuda")
        for both in (False, True):
            case = f"{kind} {rows}x{d}{', with gradients' if both else ''}"
            for variant in ("default", "torch"):
                measured = partial(measure, x, runs[kind], both=both, kernels=variant == "default")
                record.add("fake", case, variant, measured)
        del x, measured
        torch.cuda.empty_cache()


def means(rows: list[Row]) -> dict[str, float]:
    """TOPS over the products, operations over time, for variants that ran on every case."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["group"] == "linear" and "tops" in row:
            found.setdefault(row["variant"], []).append(row)
    most = max((len(of_variant) for of_variant in found.values()), default=0)
    return {
        variant: sum(row["tops"] * row["ms"] for row in of_variant) / sum(row["ms"] for row in of_variant)
        for variant, of_variant in found.items()
        if len(of_variant) == most
    }


PARTS = {"linear": linear, "input": inputs, "qk": qk, "expansion": expansion, "text": text, "fake": fakes}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part of the shapes, no alternatives")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone")
    parser.add_argument("--budget", type=float, default=135.0, help="seconds after which what is left is skipped")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("these kernels are measured on a CUDA GPU, and there is none")

    import_without_diffusers()
    torch.manual_seed(0)
    record = Recorder(options.budget)
    copied, multiplied = ceilings(record)
    for alternatives in (False,) if options.quick else (False, True):
        for name in options.only:
            ceiling = multiplied if name == "linear" else copied
            part = partial(PARTS[name], record, ceiling, alternatives=alternatives, quick=options.quick)
            record.add("part", name, "alternatives" if alternatives else "defaults", lambda p=part: p() or {})  # type: ignore[misc]
    rows = [row for row in record.rows if row["group"] != "part" or "error" in row or "skipped" in row]
    averages = means(rows)
    document = {
        "environment": environment(torch.device("cuda")),
        "settings": {"quick": options.quick, "only": options.only, "budget_s": options.budget},
        "mean_tops": averages,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    for variant, rate in averages.items():
        print(f"mean over the products, {variant}: {rate:.0f} TOPS")


if __name__ == "__main__":
    main()
