"""Loads a checkpoint as its users do, in a process that does nothing else, and runs it: times and memory as JSON.

python -m benchmarks.full_size.loading --checkpoint FOLDER --video 480x848x61 --output FILE
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import parser, write_json

PROMPT = "A steam train crosses a stone viaduct in a snow-covered valley, smoke drifting behind it, wide shot."


def load_and_run(checkpoint: Path, video: tuple[int, int, int], steps: int) -> dict[str, Any]:
    """Seconds of importing, loading and every step (the first one with what is compiled then), peak memory, and whether all
    latents are finite."""
    began = time.perf_counter()
    import torch
    from diffusers import DiffusionPipeline

    import reelquant  # noqa: F401  (registers the checkpoint format with diffusers)
    from workers.process import peak_memory_bytes
    from workers.velocity_watch import changed_latents

    imported = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(str(checkpoint), dtype=dtype)
    opened = time.perf_counter()
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    ends = [time.perf_counter()]
    held = torch.cuda.memory_allocated() if device.type == "cuda" else None

    def after_step(_step: int, latents: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return latents

    height, width, num_frames = video
    size = {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": steps}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), changed_latents(pipeline, after_step):
        latents = pipeline(PROMPT, **size, output_type="latent", generator=generator).frames
    return {
        "import_s": imported - began,
        "from_pretrained_s": opened - imported,
        "to_device_s": ends[0] - opened,
        "steps_s": [after - before for before, after in itertools.pairwise(ends)],
        "held_bytes": held,
        "peak_bytes": peak_memory_bytes(device),
        "quantized_layers": sum(name.endswith(".weight_packed") for name in pipeline.transformer.state_dict()),
        "latents_finite": bool(torch.isfinite(latents).all()),
        "latents_std": float(latents.float().std()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__)
    given.add_argument("--checkpoint", type=Path, required=True)
    given.add_argument("--video", required=True, metavar="HEIGHTxWIDTHxFRAMES")
    given.add_argument("--steps", type=int, default=2)
    options = given.parse_args(arguments)
    height, width, num_frames = (int(part) for part in options.video.split("x"))
    found = load_and_run(options.checkpoint, (height, width, num_frames), options.steps)
    write_json(options.output, found)


if __name__ == "__main__":
    main()
