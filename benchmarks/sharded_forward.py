"""Memory and time of HunyuanVideo-13B's forward pass where several GPUs share the model, with the salience hooks on.

    python -m benchmarks.sharded_forward --output benchmarks/results/sharded_forward.json
    python -m benchmarks.sharded_forward --sharding deepspeed --layout 16 45 80 --output ...

Writes a checkpoint with random weights in bf16 into a temporary folder (24 GiB at full depth; `--folder` keeps it and uses it
again), then starts a process a GPU that opens it as the pipeline's workers do and runs forward passes, each rank on its own
random latents: first without hooks, then with those that trajectories are generated with. `--compare` runs rank 0's passes
once more in one process with the whole model, on one GPU, and compares outputs and salience.

`--layout` is in tokens: 16 30 53 is a video of 480 x 848 x 61, 16 45 80 one of 720 x 1280 x 61. `held_bytes` is allocated
after loading, `peak_bytes` the most since then, both by the allocator's books. On a CPU memory is that of the process, and the
figures only show that the script works (`--heads 2 --double 1 --single 2 --layout 1 4 4`).

Predicted for two H100 at 480 x 848 x 61: 12 GiB held, peak below 18 GiB with hooks (the bar; 0.35 GiB of it theirs), no more
than 0.2 s (8 %) over the time without hooks for the weight error and the spectral norms of 60 block inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.harness import (
    environment,
    free_memory,
    markdown,
    parser,
    settings_of,
    synchronize,
    visible_gpus,
    write_record,
)
from benchmarks.random_checkpoint import write_transformer
from benchmarks.random_model import transformer_config
from reelquant.families.hunyuan_video import FAMILY
from reelquant.settings.generation import Numerics
from workers.process import peak_memory_bytes, prepare_process
from workers.process_group import join_process_group
from workers.salience_hooks import SalienceHooks
from workers.sharded_model import open_sharded_transformer
from workers.sharding import Sharding

TEXT_TOKENS = 256


def inputs(config: dict[str, Any], layout: list[int], *, rank: int, device: torch.device) -> dict[str, Any]:
    """Of one forward pass, other ones on every rank."""
    generator = torch.Generator().manual_seed(rank)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(device, torch.bfloat16)

    frames, height, width = layout
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    return {
        "hidden_states": drawn(config["in_channels"], frames * patch_t, height * patch, width * patch),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": drawn(TEXT_TOKENS, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(1, TEXT_TOKENS, device=device, dtype=torch.bfloat16),
        "pooled_projections": drawn(config["pooled_projection_dim"]),
        "guidance": torch.tensor([6000.0], device=device, dtype=torch.bfloat16),
        "return_dict": False,
    }


def measure_rank(options: argparse.Namespace) -> None:
    """What one process does: opens the model, runs it, writes `rank-<n>.json` and `rank-<n>.safetensors`."""
    device, _ = prepare_process(Numerics("bfloat16", options.threads))
    rank, sharding = int(os.environ["RANK"]), Sharding(options.sharding, options.offload, options.offload_path)
    config = json.loads((options.folder / "config.json").read_text())
    start = time.perf_counter()
    if sharding.sharding == "none":
        from diffusers import HunyuanVideoTransformer3DModel

        opened = HunyuanVideoTransformer3DModel.from_pretrained(options.folder, torch_dtype=torch.bfloat16)
        model: nn.Module = opened.to(device).eval()
    else:
        device = join_process_group(device)
        model = open_sharded_transformer(options.folder, device=device, dtype=torch.bfloat16, sharding=sharding)
        dist.barrier()
    synchronize(device)
    result: dict[str, Any] = {"load_s": time.perf_counter() - start, "held_bytes": held_bytes(device)}
    given = inputs(config, options.layout, rank=rank, device=device)
    output, result["plain"] = passes(lambda: model(**given)[0], device, options.repeats)
    hooks = SalienceHooks(FAMILY, [model], weight_bits=4, max_tokens=256)

    def watched() -> Tensor:
        hooks.begin(given, conditional=True)
        output: Tensor = model(**given)[0]
        return output

    with hooks.watching():
        _, result["with_hooks"] = passes(watched, device, options.repeats)
    result["device"] = environment(device)["device"]
    (options.results / f"rank-{rank}.json").write_text(json.dumps(result))
    features = {name: steps[-1].contiguous() for name, steps in hooks.salience.items()}
    save_file({"output": output.cpu().contiguous(), **features}, options.results / f"rank-{rank}.safetensors")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def passes(forward: Any, device: torch.device, repeats: int) -> tuple[Tensor, dict[str, Any]]:
    """The last output; peak memory of all passes and seconds of each but the first."""
    free_memory(device)
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        with torch.no_grad():
            output = forward()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    figures = {"peak_bytes": peak_memory_bytes(device), "peak_reserved_bytes": reserved, "seconds": seconds[1:]}
    return output, figures


def held_bytes(device: torch.device) -> int:
    """Allocated now, or the process's peak on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory_bytes(device)


def run_ranks(options: argparse.Namespace, *, sharding: str, num_ranks: int, results: Path) -> list[dict[str, Any]]:
    """Starts a process a rank, each with a GPU of its own where there are GPUs, and reads what they found."""
    results.mkdir()
    shared = [
        "--rank",
        "--output",
        options.output,
        "--folder",
        options.folder,
        "--results",
        results,
        "--sharding",
        sharding,
    ]
    shared += ["--offload", options.offload if sharding != "none" else "none", "--repeats", options.repeats]
    shared += ["--threads", options.threads, "--layout", *options.layout]
    if options.offload_path is not None:
        shared += ["--offload-path", options.offload_path]
    gpus = visible_gpus(num_ranks) if torch.cuda.is_available() else None
    started = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, port = server.getsockname()
        for rank in range(num_ranks):
            place = {
                "RANK": rank,
                "WORLD_SIZE": num_ranks,
                "LOCAL_RANK": 0,
                "MASTER_ADDR": address,
                "MASTER_PORT": port,
            }
            place |= {"MASTER_LISTEN_FD": server.fileno()} if rank == 0 else {}
            place |= {"CUDA_VISIBLE_DEVICES": gpus[rank]} if gpus else {}
            environ = {**os.environ, **{name: str(value) for name, value in place.items()}}
            arguments = [sys.executable, "-m", "benchmarks.sharded_forward", *map(str, shared)]
            held = [server.fileno()] if rank == 0 else []
            started.append(subprocess.Popen(arguments, env=environ, pass_fds=held))
    try:
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started):  # the others wait for it
                break
            time.sleep(0.2)
    finally:
        for process in started:
            process.kill()
    if any(process.wait() for process in started):
        raise SystemExit(f"a rank failed under {sharding}; its error is above")
    return [json.loads((results / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]


def compare(sharded: Path, whole: Path) -> dict[str, Any]:
    """Largest relative difference of every feature, and of the output by its norm; 0 is bit for bit."""
    first, second = load_file(sharded), load_file(whole)
    differences = {}
    for name, expected in second.items():
        found, wanted = first[name].double(), expected.double()
        relative = (
            (found - wanted).norm() / wanted.norm() if name == "output" else ((found - wanted) / wanted).abs().max()
        )
        differences[name] = float(relative)
    return differences


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parser(__doc__)
    given.add_argument("--sharding", choices=["fsdp", "deepspeed", "none"], default="fsdp")
    given.add_argument("--ranks", type=int, default=2)
    given.add_argument("--offload", choices=["none", "cpu", "nvme"], default="none")
    given.add_argument("--offload-path", type=Path)
    given.add_argument("--layout", type=int, nargs=3, default=[16, 30, 53], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    given.add_argument("--double", type=int, default=20, help="double-stream blocks")
    given.add_argument("--single", type=int, default=40, help="single-stream blocks")
    given.add_argument("--heads", type=int, default=24)
    given.add_argument("--repeats", type=int, default=3)
    given.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    given.add_argument("--compare", action="store_true", help="with the whole model on one device")
    given.add_argument("--folder", type=Path, help="checkpoint: used if it is there, written and kept if not")
    given.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    options = given.parse_args(arguments)
    if options.rank:
        measure_rank(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        measure(options, Path(temporary))


def measure(options: argparse.Namespace, temporary: Path) -> None:
    """Writes the checkpoint where there is none, runs all ranks, writes the result."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.folder = options.folder or temporary / "transformer"
    sizes = {"num_layers": options.double, "num_single_layers": options.single, "num_attention_heads": options.heads}
    config = {**transformer_config(), **sizes}
    start = time.perf_counter()
    if not (options.folder / "config.json").is_file():
        write_transformer(options.folder, config, device)
    elif json.loads((options.folder / "config.json").read_text()) != config:
        raise SystemExit(f"{options.folder} holds a model of other sizes: give another folder, or none")
    written_s = time.perf_counter() - start
    free_memory(device)
    ranks = run_ranks(options, sharding=options.sharding, num_ranks=options.ranks, results=temporary / "ranks")
    whole, differences = None, None
    if options.compare:
        [whole] = run_ranks(options, sharding="none", num_ranks=1, results=temporary / "whole")
        differences = compare(temporary / "ranks" / "rank-0.safetensors", temporary / "whole" / "rank-0.safetensors")
    files = sum(path.stat().st_size for path in options.folder.glob("*.safetensors"))
    document = write_record(
        options.output,
        device,
        settings_of(options, "folder", "rank", "results", "offload_path"),
        checkpoint_bytes=files,
        written_s=written_s,
        ranks=ranks,
        whole=whole,
        relative_differences=differences,
    )
    print(table(document))


def table(document: dict[str, Any]) -> str:
    """Markdown: the worst rank beside the whole model."""
    settings = document["settings"]
    head = ("model", "loaded, s", "held, GiB", "peak, GiB", "a pass, s", "with hooks: peak, GiB", "a pass, s")
    rows = []
    groups = {f"{settings['sharding']}, {settings['ranks']} ranks": document["ranks"]}
    if document["whole"] is not None:
        groups["whole, one device"] = [document["whole"]]
    for name, ranks in groups.items():
        cells = [max(rank["load_s"] for rank in ranks), max(rank["held_bytes"] for rank in ranks) / 2**30]
        for passes_of in ("plain", "with_hooks"):
            cells.append(max(rank[passes_of]["peak_bytes"] for rank in ranks) / 2**30)
            cells.append(max(min(rank[passes_of]["seconds"]) for rank in ranks))
        rows.append([name, *(f"{cell:.2f}" for cell in cells)])
    found = markdown(head, rows)
    if document["relative_differences"] is None:
        return found
    apart = ", ".join(f"{name} {value:.1g}" for name, value in document["relative_differences"].items())
    return f"{found}\n\nRelative differences of the two, after all blocks: {apart}."


if __name__ == "__main__":
    main()
