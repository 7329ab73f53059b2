"""How far quantization, sparse attention and both together move the attention (QuantSparse table 8), and what is left of it.

    python -m benchmarks.attention_shift runs/studies/joint/seed-0 --output benchmarks/results/attention_shift.json

Reads finished runs of one model in one folder: their checkpoints, and from `--naive` the model, the prompts and the mask that
both come from. All rows see the same latents: those of the full-precision generation of each held-out prompt, step by step.

| row | weights, activations | attention |
|---|---|---|
| quantization | of the run `--naive` | dense |
| sparsification | full precision | the masks of `--naive`, no residual |
| both, naively | of `--naive` | its masks |
| any other run | its own | its own, with its residual, dense steps and refreshes |

A block's shift is `||A - A_FP||^2 / ||A_FP||^2` of its attention's output `[H, L, D]` before the output projection, so that
blocks count alike whatever their scale; the table has the mean over blocks, steps and prompts, and the mean squared error.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import markdown, parser, write_json
from pipeline.provenance import provenance
from reelquant.checkpoint.reader import read_config
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.families.family import family_of_architecture
from reelquant.families.hunyuan_video_attention import CoreAttentionProcessor
from reelquant.ops.band_attention.op import dense_attention
from reelquant.runtime.attach import attach_runtime
from reelquant.settings.generation import Generation, Numerics
from workers.generation import generate
from workers.messages import PromptUnit
from workers.model_source import open_pipeline
from workers.process import device_name, prepare_process, unit_seed

Outputs = dict[str, Tensor]
"""A step's attention outputs by block."""


class WatchedTransformer:
    """A transformer whose attention outputs of the last forward pass are kept."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.outputs: Outputs = {}
        family = family_of_architecture(type(transformer).__name__)
        for name in family.block_names(dict(transformer.config)):
            attention = transformer.get_submodule(f"{name}.attn")
            inner = getattr(attention.processor, "core", lambda _item, q, k, v: dense_attention(q, k, v))
            attention.set_processor(CoreAttentionProcessor(self._kept(name, inner)))

    def _kept(self, name: str, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def core(item: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = inner(item, q, k, v)
            self.outputs[name] = out
            return out

        return core

    def run(self, kwargs: dict[str, Any]) -> Outputs:
        """The attention outputs of one forward pass."""
        self.outputs = {}
        self.transformer(**kwargs)
        return self.outputs


def shifts(found: Outputs, exact: Outputs) -> list[tuple[float, float]]:
    """Relative and mean squared error of every block."""
    return [
        (
            float((found[name] - out).square().sum() / out.square().sum()),
            float((found[name] - out).square().mean()),
        )
        for name, out in exact.items()
    ]


def open_rows(folder: Path, naive: str, others: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The transformers of all rows but full precision, by the row's name."""
    model = Path(json.loads((folder / naive / "config.json").read_text(encoding="utf-8"))["config"]["model"])
    spec = QuantizationSpec.from_dict(read_config(folder / naive / "checkpoint" / "transformer")["quantization_config"])
    if spec.sparse_attention is None:
        raise SystemExit(f"{folder / naive} has dense attention: --naive must name a run with sparse attention")

    def transformer(run: str) -> Any:
        return open_pipeline(folder / run / "checkpoint", device=device, dtype=dtype).transformer

    sparse_only = open_pipeline(model, device=device, dtype=dtype).transformer
    attach_runtime(sparse_only, QuantizationSpec("", "", {}, sparse_attention=spec.sparse_attention))
    quantized_only = transformer(naive)
    quantized_only.sparse_attention.enabled = False
    return {
        "quantization": quantized_only,
        "sparsification": sparse_only,
        "both, naively": transformer(naive),
        **{run: transformer(run) for run in others},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the recorded result holds."""
    device, dtype = prepare_process(Numerics("auto", options.threads))
    naive = json.loads((options.folder / options.naive / "config.json").read_text(encoding="utf-8"))["config"]
    others = options.runs or sorted(
        path.parent.parent.name
        for path in options.folder.glob("*/checkpoint/model_index.json")
        if path.parent.parent.name != options.naive
    )
    rows = {
        name: WatchedTransformer(transformer)
        for name, transformer in open_rows(options.folder, options.naive, others, device, dtype).items()
    }
    pipeline = open_pipeline(Path(naive["model"]), device=device, dtype=dtype)
    reference = WatchedTransformer(pipeline.transformer)
    prompts = Path(naive["prompts"]["held_out"]).read_text(encoding="utf-8").split("\n")
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()][: options.prompts]
    found: dict[str, list[list[list[tuple[float, float]]]]] = {name: [] for name in rows}

    def compare(_module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        exact = dict(reference.outputs)
        for name, row in rows.items():
            found[name][-1].append(shifts(row.run(kwargs), exact))

    handle = pipeline.transformer.register_forward_hook(compare, with_kwargs=True)
    for index, prompt in enumerate(prompts):
        for steps in found.values():
            steps.append([])
        unit = PromptUnit(f"prompt-{index:03d}", prompt)
        seed = unit_seed(naive["seed"], "evaluation", unit.name)
        generate(pipeline, unit, Generation(**naive["generation"]), seed=seed, progress=lambda *_: None)
        print(f"{index + 1} of {len(prompts)}: {prompt}", flush=True)
    handle.remove()
    return {
        "provenance": provenance(),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "folder": options.folder.name,
        "prompts": prompts,
        "values": "[prompt][step][block] = [relative, mean squared]",
        "rows": found,
    }


def table(document: dict[str, Any]) -> str:
    """Markdown: means over blocks, steps and prompts."""
    head = ("attention under", "relative shift", "mean squared error", "first half of the steps", "second half")
    lines = []
    for name, prompts in document["rows"].items():
        steps = [step for prompt in prompts for step in prompt]
        relative = statistics.fmean(block[0] for step in steps for block in step)
        squared = statistics.fmean(block[1] for step in steps for block in step)
        halves = []
        for part in (slice(None, len(prompts[0]) // 2), slice(len(prompts[0]) // 2, None)):
            halves.append(statistics.fmean(b[0] for prompt in prompts for step in prompt[part] for b in step))
        lines.append([name, f"{relative:.4f}", f"{squared:.5f}", f"{halves[0]:.4f}", f"{halves[1]:.4f}"])
    return markdown(head, lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__)
    given.add_argument("folder", type=Path, help="holds finished runs, such as one seed of a study")
    given.add_argument("--naive", default="naive", help="run quantized without knowing of its sparse attention")
    given.add_argument("--runs", nargs="*", default=[], help="other runs of the folder; all if none is named")
    given.add_argument("--prompts", type=int, default=8, help="held-out prompts, from the top")
    given.add_argument("--threads", type=int, default=1)
    options = given.parse_args(arguments)
    document = measure(options)
    write_json(options.output, document, indent=None)
    print(table(document))


if __name__ == "__main__":
    main()
