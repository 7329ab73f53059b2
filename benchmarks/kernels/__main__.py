"""Speed of the kernels beside the card's ceilings and torch's own operations, in one run on one device.

    python -m benchmarks.kernels --only linear text input qk expansion --output benchmarks/results/linear_kernels.json
    python -m benchmarks.kernels --only attention sums --output benchmarks/results/attention_kernels.json
    python -m benchmarks.kernels --only eight_bit --output benchmarks/results/eight_bit_attention.json
    python -m benchmarks.kernels --only fake --output benchmarks/results/fake_quantization.json

At the sizes of HunyuanVideo at 720 x 1280, 61 frames (16 x 45 x 80 video tokens, 256 of text, 24 heads of 128). Each kernel is
one file of this folder, whose docstring lists its cases.

Data are Gaussian with loud channels: a card at its power limit is faster on zeros. Times are medians of
`triton.testing.do_bench` (L2 flushed); kernels shorter than a launch run as CUDA graphs over buffers that together exceed L2.
A case that fails is recorded with its error and the rest goes on; what is left after `--budget` seconds is recorded as
skipped. `--small` and `--device cpu`, with TRITON_INTERPRET=1, show that the script works.

Predicted on an H100 (3.0 TB/s copy, 780 TFLOP/s bf16): linear 1100-1200 TOPS, expansion and qk 80-90 % of the copy, input with
norm 0.20-0.25 ms; attention at density 0.15 450 TFLOP/s in 16 bits, 750 in 8; a refresh 90 ms, in 8 bits 55; column sums 75.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import environment, parser, settings_of, write_record
from benchmarks.kernels import (
    band_attention,
    column_sums,
    eight_bit_attention,
    fake_quantization,
    input_quantization,
    int8_linear,
    qk_norm_rope,
    weight_expansion,
)
from benchmarks.kernels.bench import FULL, SMALL, Bench, Kernel
from benchmarks.kernels.tables import linear_table, mean_tops

KERNELS: dict[str, Kernel] = {
    "linear": int8_linear.products,
    "text": int8_linear.products_of_text,
    "expansion": weight_expansion.measure,
    "input": input_quantization.measure,
    "qk": qk_norm_rope.measure,
    "fake": fake_quantization.measure,
    "attention": band_attention.measure,
    "sums": column_sums.measure,
    "eight_bit": eight_bit_attention.measure,
}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__, device=True)
    given.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS), help="these kernels alone")
    given.add_argument("--budget", type=float, default=135.0, help="seconds after which what is left is skipped")
    given.add_argument("--small", action="store_true", help="sizes for a CPU")
    options = given.parse_args(arguments)

    import triton

    torch.manual_seed(0)
    device = torch.device(options.device)
    bench = Bench(SMALL if options.small else FULL, device, options.budget)
    bench.measure_ceilings()
    for name in options.only:
        whole = bench.record.add({"group": "kernel", "case": name, "variant": "all"}, partial(_all_of, name, bench))
        if not {"error", "skipped"} & set(whole):
            bench.record.rows.remove(whole)
    rows = bench.record.rows
    versions = {"triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    document = write_record(
        options.output,
        environment(device) | versions,
        settings_of(options) | {"dtype": str(bench.dtype)},
        mean_tops=mean_tops(rows),
        rows=rows,
    )
    print(linear_table(document))


def _all_of(name: str, bench: Bench) -> dict[str, object]:
    KERNELS[name](bench)
    return {}


if __name__ == "__main__":
    main()
