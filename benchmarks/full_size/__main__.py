"""The whole pipeline at full size: a real architecture with random weights, until its checkpoint is loaded again.

    python -m benchmarks.full_size --output benchmarks/results/full_size.json
    python -m benchmarks.full_size --video 720x1280x61 --samples 1 --output ...
    python -m benchmarks.full_size --model wan2.1-14b --video 480x832x81 --transformer num_layers=8 --output ...

Writes a diffusers pipeline folder of a model of `configs/models` (real transformers, VAE and scheduler, but for what
`--transformer` and `--vae` change; text encoders of the real widths with few layers), then calls `python -m pipeline` as a user
does, with real Ray workers and a real store, cheaply but with every stage:

| part | what is called |
|---|---|
| `model` | nothing: the folder is written, or used if it is there (`--folder`, `--model-folder`) |
| `plan` | `pipeline plan`, with all its checks of the weights |
| `activations` | `pipeline run --until activations`: trajectories with salience, selection, activations; one shared model |
| `warm` | `pipeline run --until distillation` with one epoch, into a run of its own: kernels are compiled, libraries read |
| `distillation` | `pipeline run --until assembly`: all segments, a worker a GPU; and the checkpoint, if `load` follows |
| `load` | a fresh process: plain `from_pretrained`, and two denoising steps |
| `alone` | `pipeline run --until distillation` by one worker, of the same calibration data: linked after `activations` |

Without `warm` a machine's first distillation is measured, as a user has it once.

`alone` comes last, as it takes longest, or with `--beside` at the same time as `distillation`. With `--budget-s` it is stopped
when the time is up, and the speed-up follows from what one worker has done by then. The record is written after every part, and
a part that fails leaves the others' figures. Figures are those of the run directory (records, event log), beside those of the
plan. The bars: bytes within 1 % of the plan, memory within 25 %.

`--output` may hold runs of other settings: one of the same `--label` is replaced, others stay. On a CPU (`--transformer
num_attention_heads=1 num_layers=1 num_single_layers=2 text_embed_dim=128 --video 48x64x5`) figures only show that it works.

Predicted for two H100 at 480 x 848 x 61, FSDP: 16 GiB at the peak of trajectories; 0.5 GB/s of activations a GPU, and a store
that takes more; a distillation that takes half as long on two; GPTQ's solves more than half of its time at 4 samples and one
epoch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.full_size.parts import PARTS, FullSize
from benchmarks.full_size.setting import Setting
from benchmarks.full_size.tables import table
from benchmarks.harness import parser, read_record, write_json
from benchmarks.random_checkpoint import models
from pipeline import cli, runner  # noqa: F401  (what the pipeline needs must be there before 24 GiB are written)
from pipeline.report import page  # noqa: F401


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    # A command's budget holds its imports too, 20 s of it on a GPU host.
    past = time.time() - psutil.Process().create_time() if arguments is None else 0.0
    began = time.monotonic() - past
    options = parse(arguments)
    setting = Setting.of(options)
    label = options.label or setting.label
    deadline = began + options.budget_s if options.budget_s else None

    def save(record: dict[str, Any]) -> None:
        write_record(options.output, label, record)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        skipped = setting.workers == 1 or setting.beside  # there is nothing to compare, or it is done before
        parts = [part for part in PARTS if part in options.parts and not (skipped and part == "alone")]
        model = (options.model_folder or folder / "model").resolve()
        well = FullSize(setting, folder.resolve(), model=model, deadline=deadline, save=save).do(parts)
    print(table(read_record(options.output)))
    if not well:
        raise SystemExit(1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    given = parser(__doc__)
    given.add_argument("--video", default="480x848x61", metavar="HEIGHTxWIDTHxFRAMES")
    given.add_argument("--model", default="hunyuanvideo-13b", choices=models(), help="of configs/models")
    given.add_argument(
        "--transformer", nargs="+", default=[], metavar="KEY=VALUE", help="other values of its configuration"
    )
    given.add_argument("--vae", nargs="+", default=[], metavar="KEY=VALUE", help="other values of its configuration")
    given.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the pipeline's configuration")
    given.add_argument("--sharding", choices=["fsdp", "deepspeed", "none"], default="fsdp")
    given.add_argument("--offload", choices=["none", "cpu", "nvme"], default="none")
    given.add_argument("--offload-path", type=Path)
    given.add_argument("--workers", type=int, help="GPUs to use, default all; processes on a CPU, default 2")
    given.add_argument("--threads", type=int, help="CPU threads of a worker; default: up to 8")
    given.add_argument("--steps", type=int, default=3, help="denoising steps of a trajectory")
    given.add_argument("--samples", type=int, default=4)
    given.add_argument("--epochs", type=int, default=1)
    given.add_argument("--preset", default="reelquant", help="of the method")
    given.add_argument("--rounding", choices=["gptq", "nearest"], default="gptq")
    given.add_argument("--segment-length", type=int, default=8)
    given.add_argument("--deterministic", action="store_true", help="the same bytes with any number of GPUs; slower")
    given.add_argument(
        "--beside", action="store_true", help="`alone` at the same time as `distillation`, on a GPU more than --workers"
    )
    given.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    given.add_argument("--folder", type=Path, help="for model and runs, kept: a later call with it goes on")
    given.add_argument("--model-folder", type=Path, help="for the model, kept; default: in --folder")
    given.add_argument(
        "--budget-s", type=float, help="seconds from the start on, after which the part at work is stopped"
    )
    given.add_argument("--label", help="of the run in the record; default such as '480p fsdp'")
    return given.parse_args(arguments)


def write_record(path: Path, label: str, record: dict[str, Any]) -> None:
    """Puts the run into the file, in place of an older one of its label; the file is whole at every moment."""
    runs = read_record(path)["runs"] if path.is_file() else {}
    write_json(path, {"environment": record["environment"], "runs": {**runs, label: record}})


if __name__ == "__main__":
    main()
