"""Memory and time of what calibration computes on attention maps, beside dense attention itself, in one run.

    python -m benchmarks.attention_memory --output benchmarks/results/attention_memory.json

At the tokens of HunyuanVideo at 720 x 1280 (57,856), 24 heads of size 128, bf16, on a CUDA GPU:

- ``column sums``: `attention_column_sums`, once per sample and block,
- ``global loss``, ``local loss``: forward and backward from stored targets, once per step; stride 128, 256 salient tokens,
- ``targets``: the full-precision side of both, once per sample and block,
- ``dense forward``, ``dense forward and backward``: torch's scaled_dot_product_attention, for comparison.

Peak memory is the allocator's, above what is allocated before the call (q and k of both sides, v and the targets), so that
gradients count. On a CPU it is left out (null in the JSON) and the figures only show that the script works. One call
warms up, `--repeats` count. Of the packages that reelquant needs, torch alone must be there.

Predicted for the size above: column sums below 0.2 GiB (a tile of 64 MiB, one head's q and k in float32), local loss about
1.1 GiB (the gradient of k twice and of q once, 0.33 GiB each; three tiles), global loss about 0.7 GiB (two gradients).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import gib, markdown, parser, repeated, settings_of, write_record
from reelquant.attention.column_sums import attention_column_sums
from reelquant.calibration.attention_distillation import attention_targets, global_loss, local_loss, salient_tokens


def cases(q: Tensor, k: Tensor, *, stride: int, num_salient: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of everything that is measured; what a call needs beside q and k is made here, before it is measured."""
    yield "column sums", lambda: attention_column_sums(q, k)
    # Which tokens are salient changes neither time nor memory: spread ones.
    indices = salient_tokens(torch.rand(q.shape[1], device=q.device), num_salient)
    yield "targets", lambda: attention_targets(q, k, stride=stride, indices=indices)
    targets = attention_targets(q, k, stride=stride, indices=indices)
    near_q, near_k = ((x + 0.05 * torch.randn_like(x)).requires_grad_() for x in (q, k))
    yield "global loss", lambda: torch.autograd.grad(global_loss(targets, near_q, near_k), (near_q, near_k))
    yield "local loss", lambda: torch.autograd.grad(local_loss(targets, near_q, near_k), (near_q, near_k))
    v = torch.randn_like(q).requires_grad_()
    yield "dense forward", lambda: dense(q, k, v.detach())
    yield "dense forward and backward", lambda: torch.autograd.grad(dense(near_q, near_k, v).sum(), (near_q, near_k, v))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[H, L, D], by whatever torch takes for these tensors."""
    return scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))[0]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, as measured."""
    rows = [
        [
            name,
            gib(row["peak_bytes"], 2, nothing="not measured"),
            f"{row['median_s']:.4f} ({row['min_s']:.4f}-{row['max_s']:.4f})",
        ]
        for name, row in results.items()
    ]
    return markdown(("computation", "peak above its inputs, GiB", "seconds"), rows)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__, device=True)
    given.add_argument("--tokens", type=int, default=57_856)
    given.add_argument("--heads", type=int, default=24)
    given.add_argument("--head-dim", type=int, default=128)
    given.add_argument("--stride", type=int, default=128)
    given.add_argument("--salient", type=int, default=256, help="salient tokens")
    given.add_argument("--repeats", type=int, default=3)
    options = given.parse_args(arguments)
    sizes = {
        f"--{name.replace('_', '-')}": getattr(options, name) for name in ("tokens", "heads", "head_dim", "repeats")
    }
    if too_small := [f"{name} {value}" for name, value in sizes.items() if value < 1]:
        given.error(f"{', '.join(too_small)}: at least 1")

    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (options.heads, options.tokens, options.head_dim)
    q, k = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
    results = {}
    for name, call in cases(q, k, stride=options.stride, num_salient=options.salient):
        results[name] = repeated(call, device, options.repeats)
        print(f"{name}: {results[name]['median_s']:.4f} s", file=sys.stderr)
    print(table(results))
    if device.type != "cuda":
        print("memory is measured on CUDA alone")
    write_record(options.output, device, settings_of(options) | {"dtype": "bfloat16"}, results=results)


if __name__ == "__main__":
    main()
