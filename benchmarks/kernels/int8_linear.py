"""INT8 products.

- ``linear``: the six products of a block with what follows them, beside bf16 `torch.mm`, `torch._int_mm` (int32 out) and
  `torch._scaled_mm` (fp8, row-wise scales), which compute the product alone,
- ``text``: products of few tokens, rated by the bytes of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu

from benchmarks.harness import Row
from benchmarks.kernels.bench import Bench, Options, Sizes
from reelquant.ops.architecture import architecture
from reelquant.ops.input_quantization.reference import quantize_input_reference
from reelquant.ops.int8_linear.launch import choose_config, launch_int8_linear
from reelquant.quantization.weight_grid import fit_two_level

REAL_TEXT = 60
"""Tokens of a prompt of usual length."""


def shapes(sizes: Sizes) -> dict[str, tuple[int, int, list[tuple[int, str]]]]:
    """Tokens, inputs, launches (outputs and epilogue) of a block's products. The single block's two read one input and write
    two buffers."""
    video, joint, width = sizes.video, sizes.joint, sizes.width
    return {
        "double qkv": (video, width, [(3 * width, "bias")]),
        "double out": (video, width, [(width, "residual")]),
        "double fc1": (video, width, [(4 * width, "gelu")]),
        "double fc2": (video, 4 * width, [(width, "residual")]),
        "single in": (joint, width, [(3 * width, "bias"), (4 * width, "gelu")]),
        "single out": (joint, 5 * width, [(width, "residual")]),
    }


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of 8 bits."""
    return quantize_input_reference(x, bits=8, channel_scale=None, rotation=None, clip=None, norm=None)


def weight_of(bench: Bench, n: int, d: int) -> tuple[Tensor, Tensor]:
    """INT8 weight of 4-bit codes in two levels, and its scale."""
    weight = bench.randn(n, d, dtype=torch.float32) / d**0.5
    grid = fit_two_level(weight, 4)
    return grid.expand(grid.round(weight)), grid.scale[:, 0].contiguous()


def products(bench: Bench) -> None:
    """The six products of all tokens."""
    for name, (num_tokens, d, launches) in shapes(bench.sizes).items():
        x = bench.loud(num_tokens, d)
        operands = [(*weight_of(bench, n, d), epilogue) for n, epilogue in launches]
        codes, scale = codes_of(x)
        measured: dict[str, Callable[[], Row]] = {
            "default": partial(_ours, bench, codes, scale, operands),
            **_of_torch(bench, x, codes, torch.cat([weight for weight, *_ in operands])),
        }
        operations = 2.0 * num_tokens * d * sum(n for n, _ in launches)
        for variant, call in measured.items():
            bench.add("linear", name, variant, lambda c=call, o=operations: bench.rated(c(), o))  # type: ignore[misc]
        del x, measured
        bench.free()


def _ours(bench: Bench, codes: Tensor, scale: Tensor, operands: list[tuple[Tensor, Tensor, str]]) -> Row:
    """All launches of a case together, checked against float64 on rows from both ends."""
    calls, worst = [], 0.0
    rows = torch.cat([torch.arange(70), torch.arange(len(codes) - 70, len(codes))]).to(bench.device)
    for weight, weight_scale, epilogue in operands:
        n = len(weight)
        out = torch.full((len(codes), n), float("nan"), device=bench.device, dtype=bench.dtype)
        bias = bench.randn(n)
        gate = bench.randn(n, dtype=torch.float32) if epilogue == "residual" else None
        residual = torch.randn_like(out) if epilogue == "residual" else None
        activation = "gelu_tanh" if epilogue == "gelu" else None
        others: Options = {"activation": activation, "gate": gate, "residual": residual, "out": out}
        calls.append(partial(launch_int8_linear, codes, scale, weight, weight_scale, bias, **others))
        calls[-1]()
        y = codes[rows].double() @ weight.double().T * scale[rows, None].double() * weight_scale.double() + bias
        y = gelu(y, approximate="tanh") if activation else y
        y = y if gate is None or residual is None else residual[rows].double() + gate * y
        worst = max(worst, float((out[rows].double() - y).norm() / y.norm()))
    count = architecture(codes.device).num_multiprocessors
    used = choose_config(len(codes), len(operands[0][0]), num_multiprocessors=count)
    return {**bench.timed(lambda: [call() for call in calls]), "relative_error": worst, "config": asdict(used)}


def _of_torch(bench: Bench, x: Tensor, codes: Tensor, weight: Tensor) -> dict[str, Callable[[], Row]]:
    """torch's own products of these sizes, without epilogue."""
    half = weight.to(bench.dtype)

    def row_wise() -> Row:
        a, b = x.to(torch.float8_e4m3fn), (half / 16).to(torch.float8_e4m3fn)
        scales = torch.rand(len(x), 1, device=x.device) + 0.5, torch.rand(1, len(weight), device=x.device) + 0.5
        return bench.timed(partial(torch._scaled_mm, a, b.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True))

    return {
        "bf16 torch.mm": lambda: bench.timed(lambda: torch.mm(x, half.T)),
        "_int_mm": lambda: bench.timed(lambda: torch._int_mm(codes, weight.T)),
        "fp8 _scaled_mm": row_wise,
    }


def products_of_text(bench: Bench) -> None:
    """Products of few tokens."""
    width = bench.sizes.width

    def copies_of(weight: Tensor) -> list[Tensor]:
        return [weight.clone() for _ in range(bench.num_copies(weight.nbytes))]

    def ours(x: Tensor, weight: tuple[Tensor, Tensor]) -> Row:
        codes, scale = codes_of(x)
        out = torch.empty(len(x), len(weight[0]), device=bench.device, dtype=bench.dtype)
        others: Options = {"activation": None, "gate": None, "residual": None, "out": out}
        calls: list[Callable[[], object]] = [
            partial(launch_int8_linear, codes, scale, copy, weight[1], None, **others) for copy in copies_of(weight[0])
        ]
        return bench.moved(bench.timed_in_graph(calls), weight[0].nbytes)

    def theirs(x: Tensor, weight: Tensor) -> Row:
        calls: list[Callable[[], object]] = [partial(torch.mm, x, copy.T) for copy in copies_of(weight)]
        return bench.moved(bench.timed_in_graph(calls), weight.nbytes)

    for d, n in [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]:
        weight = weight_of(bench, n, d)
        for num_tokens in (min(REAL_TEXT, bench.sizes.text), bench.sizes.text):
            x = bench.loud(num_tokens, d)
            case = f"{num_tokens} tokens {d} -> {n}"
            bench.add("text", case, "default", partial(ours, x, weight))
            bench.add("text", case, "bf16 torch.mm", partial(theirs, x, weight[0].to(bench.dtype)))
