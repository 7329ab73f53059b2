"""What the kernels of a profiled step reach of the card's measured ceilings, from a record of `benchmarks.dit_step`.

    python -m benchmarks.dit_step.kernel_table benchmarks/results/dit_step.json

Kernels are told by their names, in the classes of `CLASSES`; the work of a class is counted, not measured: what the model's
shapes ask for in one step. Bytes are those that must be read and written once, FLOP of sparse attention those of the pairs
that its mask leaves. Where the work is not known (small copies, the residual's factors) there is no rate.

Shapes: n video tokens, m text tokens that are worked on, L = n + m; d hidden size, H heads of size D.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ceilings import BF16, COPY, FP8, INT8, Ceiling
from benchmarks.dit_step.models import REAL_TEXT, TEXT
from benchmarks.random_model import transformer_config
from reelquant.calibration.input_groups import block_calls
from reelquant.families.hunyuan_video import FAMILY
from reelquant.tokens import TokenLayout, band_width, visited_pairs
from workers.model_source import empty_block

REST = "copies and the rest"
CLASSES = {
    "dense attention": r"sdpa|flash_fwd|fmha",
    "band attention": r"^band_attention_kernel",
    "8-bit attention": r"^eight_bit_attention_kernel",
    "8-bit keys and values": r"^quantize_keys_values_kernel|^partial_statistics|^final_statistics",
    "INT8 products": r"^int8_linear_kernel",
    "input quantization": r"^_quantize_input",
    "QK norm and RoPE": r"^_qk_norm_rope",
    "weight expansion": r"^_expand",
    # The factors come from float64 and float32 products, factorizations and triangular solves; the model has none of these.
    "factorization": r"^_grams|^_project|f64|d884|dgemm|sgemm|f32f32|gemm.*double|double|potrf|trsm|cholesky|MinMaxOps",
    "16-bit or FP8 products": r"nvjet|gemm|xmma|cutlass|splitK",
}
"""By class, what the names of its kernels hold; the first that fits counts."""
LEAST_SHARE = 1e-3
STEPS = {"kernels": "every step", "kernels_of_a_sparse_step": "sparse step", "kernels_of_a_refresh": "refresh"}
"""Names of the profiles in a case's result."""


@dataclass(frozen=True)
class Work:
    """Of one class in one step."""

    amount: float
    """FLOP, integer operations or bytes."""
    ceiling: Ceiling


@dataclass(frozen=True)
class ClassRow:
    """One class of kernels in one step."""

    name: str
    ms: float
    share: float
    """Of the step's device time."""
    work: Work | None

    @property
    def rate(self) -> float | None:
        """In the unit of the ceiling; None where the class is not what the work is counted for (the refiner's attention)."""
        if self.work is None or self.share < LEAST_SHARE:
            return None
        return self.work.amount / (self.ms / 1e3) / self.work.ceiling.per_second * self.work.ceiling.rate

    @property
    def of_ceiling(self) -> float | None:
        """Share of the ceiling."""
        return None if self.work is None or self.rate is None else self.rate / self.work.ceiling.rate


def class_of(kernel: str) -> str:
    """The class of a kernel's name."""
    return next((name for name, pattern in CLASSES.items() if re.search(pattern, kernel)), REST)


def step_work(settings: Mapping[str, Any], case: str, density: float | None) -> dict[str, Work]:
    """The work of one step by class.

    Args:
        settings: of the record.
        case: says which text tokens are worked on and in which numbers the products run.
        density: of the band; None where all attention is dense.
    """
    config = transformer_config() | {"num_layers": settings["double"], "num_single_layers": settings["single"]}
    frames, rows, columns = settings["layout"]
    layout = TokenLayout(frames, rows, columns, TEXT if case in ("diffusers", "compiled") else REAL_TEXT)
    blocks, (heads, head_dim) = FAMILY.block_names(config), FAMILY.num_heads(config)
    pair_flop = 4.0 * heads * head_dim * len(blocks)
    products, quantized, expanded = _linear_work(config, layout, settings["weight_bits"])
    normed = len(blocks) * (8.0 * layout.num_tokens * heads * head_dim + 8.0 * layout.num_video * head_dim)
    work = {
        "dense attention": Work(pair_flop * layout.num_tokens**2, BF16),
        "INT8 products": Work(products, INT8),
        "input quantization": Work(quantized, COPY),
        "QK norm and RoPE": Work(normed, COPY),
        "weight expansion": Work(expanded, COPY),
    }
    pairs = layout.num_tokens**2 if density is None else visited_pairs(layout, band_width(layout, density))
    work["band attention"] = Work(pair_flop * pairs, BF16)
    work["8-bit attention"] = Work(pair_flop * pairs, FP8)
    if not case.startswith("ours"):
        work["16-bit or FP8 products"] = Work(products, FP8 if case == "fp8 linears" else BF16)
    return work


def _linear_work(config: dict[str, Any], layout: TokenLayout, weight_bits: int) -> tuple[float, float, float]:
    """Operations of the token-wise products, bytes of their inputs' quantization, bytes of the weights' expansion."""
    tokens = {"video": layout.num_video, "text": layout.num_text, "joint": layout.num_tokens}
    operations = quantized = expanded = 0.0
    for first, num in (("transformer_blocks.0", config["num_layers"]),
                       ("single_transformer_blocks.0", config["num_single_layers"])):  # fmt: skip
        if not num:
            continue
        block, levels = empty_block(config, FAMILY, first), block_calls(FAMILY, config)[first].levels
        for group in (group for level in levels for group in level):
            linears: list[Any] = [block.get_submodule(name) for name in group.layers]
            sizes = sum(linear.in_features * linear.out_features for linear in linears)
            expanded += num * sizes * (1 + weight_bits / 8)
            if group.stream != "conditioning":
                operations += num * 2.0 * tokens[group.stream] * sizes
                quantized += num * tokens[group.stream] * (3.0 * linears[0].in_features + 4)
    return operations, quantized, expanded


def class_rows(kernels: list[dict[str, Any]], work: Mapping[str, Work]) -> list[ClassRow]:
    """The classes of one profiled step, largest first; what the record cut off counts as the rest."""
    total = kernels[0]["ms"] / kernels[0]["share"]
    spent = dict.fromkeys([*CLASSES, REST], 0.0)
    for row in kernels:
        spent[class_of(row["kernel"])] += row["ms"]
    spent[REST] += max(0.0, total - sum(spent.values()))
    rows = [ClassRow(name, ms, ms / total, work.get(name)) for name, ms in spent.items() if ms > 0.05]
    return sorted(rows, key=lambda row: -row.ms)


def profiles(document: Mapping[str, Any]) -> dict[tuple[str, str], list[ClassRow]]:
    """The classes by case and kind of step, of all profiles of a record."""
    found = {}
    for case, result in document["results"].items():
        for key, step in STEPS.items():
            if result.get(key):
                # A refresh in 8 bits is one pass over all pairs.
                band = None if key == "kernels_of_a_refresh" and "8-bit" in case else result.get("density")
                work = step_work(document["settings"], case, band)
                found[case, step] = class_rows(result[key], work)
    return found


def tables(document: Mapping[str, Any]) -> str:
    """Markdown, a table for all profiles."""
    lines = ["| case | step | kernels | ms | of the step | rate | of the ceiling |", "|" + "---|" * 7]
    for (case, step), rows in profiles(document).items():
        for row in rows:
            rate = share = "-"
            if row.work is not None and row.rate is not None and row.of_ceiling is not None:
                rate, share = f"{row.rate:.0f} {row.work.ceiling.unit}", f"{100 * row.of_ceiling:.0f} %"
            lines.append(
                f"| {case} | {step} | {row.name} | {row.ms:.1f} | {100 * row.share:.1f} % | {rate} | {share} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print(tables(json.loads(parser.parse_args(arguments).results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
