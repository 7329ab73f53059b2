"""What the kernels change in a video: the trained small model, quantized, with its blocks over the kernels and without.

    python -m benchmarks.kernel_parity --output benchmarks/results/kernel_parity.json

`assets/hunyuanvideo-digits` in W4A8 (rounded to nearest, so nothing has to be calibrated), dense and with sparse attention
at a density of 25 % and its residual cache, draws held-out prompts from the same noise:

| video | blocks | operations | numbers |
|---|---|---|---|
| `kernels` | fused | the kernels | bf16 |
| `reference` | diffusers' own | plain torch | bf16 |
| `float32` | diffusers' own | plain torch | float32 |
| `math attention` | diffusers' own | plain torch, attention as matrix products and softmax | bf16 |

`sparse, …, 8-bit attention` has the kernels' attention with INT8 scores and e4m3 values, and all else as `sparse`.

The transformers alone differ: text is encoded in bf16 and the VAE decodes in float32 for all. PSNR is that of 8-bit frames
against `reference`. The last two rows are the yardstick, what rounding alone does: 16 steps of a sampler enlarge every
difference. A video passes with 40 dB, or if the kernels' change is at most 3 dB above the larger of the two yardsticks.

On a CPU (`--device cpu`) `kernels` means fused blocks over the reference operations, and the figures only show that the
script works.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline, HunyuanVideoTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.dit_step.kernel_table import REST, class_of
from benchmarks.dit_step.models import make_sparse, quantize_in_place, sparse_spec
from benchmarks.harness import ROOT, markdown, parser, settings_of, write_record
from reelquant.metrics import psnr_db
from reelquant.ops.band_attention.op import Precision
from reelquant.ops.implementation import reference_only
from reelquant.runtime.sparse_attention import AttentionPrecision
from reelquant.settings.generation import Generation
from workers.generation import generate
from workers.messages import PromptUnit

MODEL = ROOT / "assets" / "hunyuanvideo-digits"
PROMPTS = ROOT / "configs" / "prompts" / "digits_held_out.txt"
BAR_DB = 40.0
NEAR_DB = 3.0
LARGEST_DB = 99.0
"""Stands for equal videos."""
YARDSTICKS = ("float32", "math attention")


class Models:
    """One pipeline, whose transformer is exchanged: the same codes in bf16 and in float32."""

    def __init__(self, device: torch.device, spec: dict[str, Any]) -> None:
        self.pipeline = DiffusionPipeline.from_pretrained(str(MODEL), dtype=torch.bfloat16, local_files_only=True)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.vae.to(torch.float32)
        self.pipeline.to(device)
        self._transformers = {dtype: _quantized(dtype, device) for dtype in (torch.bfloat16, torch.float32)}
        self._spec = spec
        self._precision: Precision = "full"

    def make_sparse(self, precision: Precision) -> None:
        """All from now on; `kernels` in this precision, the others in full."""
        self._precision = precision
        for transformer in self._transformers.values():
            make_sparse(transformer, sparse_spec(dict(transformer.config), **self._spec))

    @contextmanager
    def ready(self, video: str) -> Iterator[Any]:
        """The pipeline that draws `video`, for as long as this is open."""
        kernels = video == "kernels"
        transformer = self._transformers[torch.float32 if video == "float32" else torch.bfloat16]
        transformer.block_fusion.mode = "on" if kernels else "off"
        if hasattr(transformer, "sparse_attention"):
            precision = self._precision if kernels else "full"
            transformer.sparse_attention.implementation = "auto" if kernels else "reference"
            transformer.sparse_attention.precision = AttentionPrecision(sparse=precision, dense=precision)
        self.pipeline.transformer = transformer
        attention = _math_attention(transformer) if video == "math attention" else nullcontext()
        with nullcontext() if kernels else reference_only(), attention:
            yield self.pipeline


@contextmanager
def _math_attention(transformer: Any) -> Iterator[None]:
    """In the transformer alone: the text encoder's attention would change what it is given."""
    plain = transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel([SDPBackend.MATH]):
            return plain(*args, **kwargs)

    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward


def _quantized(dtype: torch.dtype, device: torch.device) -> Any:
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(
        str(MODEL / "transformer"), dtype=dtype, local_files_only=True
    )
    transformer = transformer.to(device).eval().requires_grad_(False)
    return quantize_in_place(transformer, weight_bits=4, activation_bits=8)


def compared(models: Models, prompts: list[str], generation: Generation) -> list[dict[str, Any]]:
    """By prompt: dB of every video against `reference`, and whether the kernels' passes."""
    rows = []
    for seed, prompt in enumerate(prompts):
        videos = {
            name: video_of(models, name, prompt, generation, seed) for name in ("reference", "kernels", *YARDSTICKS)
        }
        row: dict[str, Any] = {"prompt": prompt, "seed": seed}
        for name in ("kernels", *YARDSTICKS):
            row[name] = min(psnr_db(videos["reference"], videos[name]), LARGEST_DB)
        row["passes"] = row["kernels"] >= min(BAR_DB, min(row[name] for name in YARDSTICKS) - NEAR_DB)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def video_of(models: Models, name: str, prompt: str, generation: Generation, seed: int) -> Tensor:
    """`[F, H, W, 3]` in [0, 1]."""
    with models.ready(name) as pipeline:
        unit = PromptUnit("parity", prompt)
        return generate(pipeline, unit, generation, seed=seed, progress=lambda *_: None).video.float() / 255


def kernels_seen(draw: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """Calls of our kernels and of dense attention by class; None without a GPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        draw()
        torch.cuda.synchronize(device)
    seen: dict[str, int] = {}
    for event in profile.key_averages():
        name = class_of(event.key)
        if name != REST:
            seen[name] = seen.get(name, 0) + event.count
    return seen


def table(document: dict[str, Any]) -> str:
    """Markdown, as measured."""
    rows = []
    for attention, result in document["results"].items():
        for row in result["videos"]:
            figures = [f"{row[name]:.1f}" for name in ("kernels", *YARDSTICKS)]
            rows.append([attention, row["prompt"], *figures, "yes" if row["passes"] else "**no**"])
    lines = [markdown(("attention", "prompt", "kernels, dB", "float32, dB", "math attention, dB", "passes"), rows)]
    for attention, result in document["results"].items():
        if result["kernels_seen"]:
            seen = ", ".join(f"{name} {calls}" for name, calls in result["kernels_seen"].items())
            lines.append(f"\nCalls seen in two steps of `kernels`, {attention}: {seen}.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__, device=True)
    given.add_argument("--prompts", type=int, default=4, help="the first of the held-out prompts")
    given.add_argument("--steps", type=int, default=16)
    given.add_argument("--density", type=float, default=0.25)
    given.add_argument("--interval", type=int, default=5)
    options = given.parse_args(arguments)
    device = torch.device(options.device)
    generation = Generation(80, 96, 29, options.steps, 6.0, 32)
    spec = {"density": options.density, "dense_steps": 0, "interval": options.interval, "rank": 16}
    models = Models(device, spec)
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[: options.prompts]
    results: dict[str, Any] = {}
    sparse = f"sparse, {100 * options.density:.0f} %"
    modes: dict[str, Precision | None] = {"dense": None, sparse: "full", f"{sparse}, 8-bit attention": "int8_fp8"}
    for attention, precision in modes.items():
        if precision is not None:
            models.make_sparse(precision)
        few = Generation(80, 96, 29, 2, 6.0, 32)
        seen = kernels_seen(lambda few=few: video_of(models, "kernels", prompts[0], few, 0), device)  # type: ignore[misc]
        results[attention] = {"kernels_seen": seen, "videos": compared(models, prompts, generation)}
    print(table(write_record(options.output, device, settings_of(options), results=results)))


if __name__ == "__main__":
    main()
