"""Seconds of one whole generation of HunyuanVideo-13B beside those of its transformer, through diffusers' own pipeline.

    python -m benchmarks.generation_time --output benchmarks/results/generation_time.json

720 x 1280 x 61, 50 steps, batch 1: noise, 50 steps of the transformer and of FlowMatchEulerDiscreteScheduler, then the
decoder of AutoencoderKLHunyuanVideo with tiling, in bf16. Weights are random, of the real configurations. **Text encoding is
left out**: random embeddings (256 tokens, 60 of them real) are passed in its place.

| case | transformer |
|---|---|
| `diffusers bf16` | as it comes |
| `ours 15 %` | W4A8, fused blocks, sparse attention as in `benchmarks.dit_step`, a refresh every 5 steps |

Steps are timed from one `callback_on_step_end` to the next, with the device idle at both; the decoder's time includes the
video's postprocessing. With `--steps` or `--baseline-steps` below 50 only so many are run and the whole is extrapolated: for
ours by the kinds of steps, see `benchmarks.dit_step.schedule`. `how` says which. `--small` is a tiny model that runs on a CPU
(`--device cpu`): it only shows that the script works.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

from benchmarks.dit_step.models import (
    REAL_TEXT,
    TEXT,
    bf16_transformer,
    make_sparse,
    quantize_in_place,
    sparse_spec,
)
from benchmarks.dit_step.schedule import COMPUTED, MEASURED, SCHEDULE, mean_step
from benchmarks.harness import (
    ROOT,
    free_memory,
    gib,
    markdown,
    parser,
    peak_bytes,
    settings_of,
    synchronize,
    write_record,
)
from reelquant.attention.sparse_spec import SparseAttentionSpec

MODEL = ROOT / "configs" / "models" / "hunyuanvideo-13b"
BASELINE, OURS = "diffusers bf16", "ours 15 %"
DENSITY, INTERVAL, RANK = 0.15, 5, 16
SMALL_TRANSFORMER = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2}
SMALL_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
SMALL_VIDEO = (256, 256, 17)
VIDEO = (720, 1280, 61)


def random_pipeline(device: torch.device, *, small: bool) -> Any:
    """HunyuanVideoPipeline without text encoders, its weights random."""
    config = json.loads((MODEL / "vae" / "config.json").read_text(encoding="utf-8"))
    with device:
        vae = AutoencoderKLHunyuanVideo.from_config(config | (SMALL_VAE if small else {}))
    vae = vae.to(torch.bfloat16).eval().requires_grad_(False)
    vae.enable_tiling()
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    )
    pipeline = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=bf16_transformer(SMALL_TRANSFORMER if small else {}, device),
        vae=vae,
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeddings(config: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """What stands for the encoded prompt."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    return {
        "prompt_embeds": torch.randn(1, TEXT, config.text_embed_dim, **options),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, **options),
        "prompt_attention_mask": (torch.arange(TEXT, device=device) < REAL_TEXT).long()[None],
    }


def generated(pipeline: Any, video: tuple[int, int, int], steps: int, *, decode: bool = True) -> dict[str, Any]:
    """Seconds of every step, of the decoder, and of the whole call."""
    device = pipeline.transformer.device
    height, width, num_frames = video
    ends: list[float] = []

    def after_step(_pipeline: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        synchronize(device)
        ends.append(time.perf_counter())
        return state

    given = embeddings(pipeline.transformer.config, device)
    synchronize(device)
    begin = time.perf_counter()
    pipeline(
        **given,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        output_type="pt" if decode else "latent",
        callback_on_step_end=after_step,
        generator=torch.Generator(device).manual_seed(0),
    )
    synchronize(device)
    end = time.perf_counter()
    edges = [begin, *ends]
    return {
        "steps_s": [after - before for before, after in itertools.pairwise(edges)],
        "decode_s": end - ends[-1],
        "call_s": end - begin,
    }


def warm_up(pipeline: Any, video: tuple[int, int, int], spec: SparseAttentionSpec | None) -> None:
    """Every kind of step once, and one tile of the decoder."""
    if spec is not None:
        make_sparse(
            pipeline.transformer,
            sparse_spec(dict(pipeline.transformer.config), density=DENSITY, dense_steps=0, interval=2, rank=RANK),
        )
    generated(pipeline, video, 1 if spec is None else 4, decode=False)
    vae = pipeline.vae
    side = vae.tile_sample_min_height // vae.spatial_compression_ratio
    frames = vae.tile_sample_min_num_frames // vae.temporal_compression_ratio + 1
    with torch.no_grad():
        vae.decode(torch.zeros(1, vae.config.latent_channels, frames, side, side, device=vae.device, dtype=vae.dtype))


def measure(pipeline: Any, case: str, video: tuple[int, int, int], steps: int) -> dict[str, Any]:
    """One case on the pipeline, whose transformer is quantized on the way if it is ours."""
    spec = None
    if case == OURS:
        quantize_in_place(pipeline.transformer, weight_bits=4, activation_bits=8)
        pipeline.transformer.block_fusion.mode = "on"
        spec = sparse_spec(
            dict(pipeline.transformer.config), density=DENSITY, dense_steps=0, interval=INTERVAL, rank=RANK
        )
    gc.collect()
    device = pipeline.transformer.device
    free_memory(device)
    warm_up(pipeline, video, spec)
    if spec is not None:
        make_sparse(pipeline.transformer, spec)
    free_memory(device)
    found = generated(pipeline, video, steps)
    mean, how = statistics.fmean(found["steps_s"]), MEASURED if steps == SCHEDULE else COMPUTED
    if spec is not None:
        mean, how = mean_step(found["steps_s"], spec)
    denoising = SCHEDULE * mean
    return found | {
        "mean_step_s": mean,
        "denoising_s": denoising,
        "total_s": denoising + found["decode_s"],
        "how": how,
        "peak_bytes": peak_bytes(device),
    }


def table(document: dict[str, Any]) -> str:
    """Markdown."""
    results = document["results"]
    head = ("case", f"{SCHEDULE} steps, s", "decoder, s", "whole, s", "how", "peak, GiB", f"whole, to {BASELINE}")
    lines = []
    base = results.get(BASELINE, {}).get("total_s")
    for case, row in results.items():
        faster = f"{base / row['total_s']:.2f}×" if base else "-"
        figures = [f"{row[name]:.1f}" for name in ("denoising_s", "decode_s", "total_s")]
        lines.append([case, *figures, row["how"], gib(row["peak_bytes"]), faster])
    return markdown(head, lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__, device=True)
    given.add_argument("--cases", nargs="+", choices=(BASELINE, OURS), default=[BASELINE, OURS])
    given.add_argument("--steps", type=int, default=SCHEDULE, help="of ours; 50, or at least 10")
    given.add_argument("--baseline-steps", type=int, default=5, help="of diffusers, all alike")
    given.add_argument("--small", action="store_true", help="a tiny model and video")
    options = given.parse_args(arguments)
    device = torch.device(options.device)
    if options.steps < 2 * INTERVAL:
        given.error(f"--steps is {options.steps}: every kind of step is seen from {2 * INTERVAL} on")
    pipeline = random_pipeline(device, small=options.small)
    video = SMALL_VIDEO if options.small else VIDEO
    settings = settings_of(options, "cases") | {"video": video}
    results: dict[str, Any] = {}
    for case in sorted(options.cases, key=(BASELINE, OURS).index):
        results[case] = measure(pipeline, case, video, options.steps if case == OURS else options.baseline_steps)
        document = write_record(options.output, device, settings, results=results)
    print(table(document))


if __name__ == "__main__":
    main()
