"""What this machine lacks for a run: GPUs, workers' room, disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import constants

from pipeline.config.schema import RunConfig
from pipeline.hub_model import FoundModel
from pipeline.terminal import human_bytes
from storage.cache import Cache
from storage.location import Location, StoreUrl
from storage.lock import driver_of
from storage.open_place import open_place
from storage.run_directory import RunDirectory

RESERVE_FRAC = 0.01
"""Room for what is not counted: headers, metadata, logs, the report."""


@dataclass(frozen=True)
class Disk:
    """Room for the run directory, or for the cache where that is elsewhere."""

    existing_bytes: int
    """What is there already."""
    free_bytes: int | None
    """Free on its file system; None in a bucket, which is never full."""


def disk_of(run: Location) -> Disk:
    """Room at the run directory, which need not exist yet."""
    if isinstance(run, StoreUrl):
        return Disk(sum(num_bytes for _, num_bytes, _ in open_place(run).files()), None)
    existing = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) if run.is_dir() else 0
    return Disk(existing, shutil.disk_usage(existing_parent(run / "config.json")).free)


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def run_problems(run: Location, model: Path, *, key: str = "run") -> list[str]:
    """Why nothing can be written where the run directory is to be, or must not.

    Args:
        key: of the configuration, which says where: also that of a cache.
    """
    if isinstance(run, StoreUrl):
        return []
    if key == "cache" and run.is_dir() and (foreign := Cache(run).foreign()):
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        return [f"cache: {run} holds {shown}, which no run has put there: give a new or empty folder, or a run's cache"]
    if run.resolve().is_relative_to(model.resolve()):
        return [
            f"{key}: {run} lies inside the model {model}, whose folder must not change: give another {key} directory"
        ]
    there = run.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        inside = "is" if there == run.absolute() else f"lies inside {there}, which is"
        return [f"{key}: {run} {inside} no folder: give another {key} directory"]
    try:
        with tempfile.TemporaryFile(dir=there):
            return []
    except OSError as error:
        return [
            f"{key}: {there} is not writable ({error.strerror}), so {run} cannot be made: give another {key} directory"
        ]


def refusals(config: RunConfig, *, update: bool) -> list[str]:
    """Why the run directory, as it is now, is none for this configuration.

    Args:
        update: another configuration that it was made with is no reason.
    """
    try:
        RunDirectory.check(config.run, config.identity(), update=update)
    except ValueError as error:
        return [f"run: {error}"]
    return []


def lock_notes(run: Location) -> list[str]:
    """Who drives the run now: until that ends, nobody else can."""
    who = driver_of(run).at_work
    if who is None:
        return []
    if isinstance(run, StoreUrl):
        return [f"run: {run} is in use by {who}, or was when that was killed: both may go on, and do some work twice"]
    return [f"run: {run} is in use by {who}: a second run of it is refused until that ends"]


def disk_problems(run: Location, needed_bytes: int, disk: Disk) -> list[str]:
    """Too little room for what the run still has to write."""
    if disk.free_bytes is None:
        return []
    missing = needed_bytes * (1 + RESERVE_FRAC) - disk.existing_bytes
    if missing <= disk.free_bytes:
        return []
    return [
        f"run: {run} still needs {human_bytes(int(missing))} of disk, {human_bytes(disk.free_bytes)} are free: free some, put "
        "the run directory elsewhere, or lower selection.num_samples, raise distillation.segment_length, or compare "
        "fewer methods"
    ]


def cache_problems(model: FoundModel) -> list[str]:
    """Too little room in the Hub's cache for what has to be fetched."""
    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(existing_parent(cache / "models")).free
    if model.missing_bytes <= free:
        return []
    return [
        f"model: {human_bytes(model.missing_bytes)} of {model.name} have to be fetched to {cache}, where {human_bytes(free)} "
        "are free: free some, or set HF_HUB_CACHE to a folder with room"
    ]


def cache_notes(model: FoundModel) -> list[str]:
    """What has to be fetched before the run."""
    if not model.is_outline:
        return []
    return [
        f"model: {human_bytes(model.missing_bytes)} of {model.name} are not in the Hub's cache {constants.HF_HUB_CACHE}: a run "
        "fetches them first, and checks the weights then"
    ]


def worker_problems(config: RunConfig) -> list[str]:
    """Workers that this machine cannot hold; nothing is known about a cluster before it is reached."""
    workers, problems = config.workers, []
    if workers.num_workers != "auto" and workers.num_workers < 1:
        problems.append(f"workers.num_workers is {workers.num_workers}; 1 or more, or auto")
    if workers.num_gpus > 1 and workers.num_gpus % 1:
        problems.append(
            f"workers.num_gpus is {workers.num_gpus:g}; a fraction of one GPU (such as 0.5), or a whole number of them"
        )
    if is_remote(config):
        return problems
    if workers.sharding == "deepspeed" and find_spec("deepspeed") is None:
        problems.append(
            "workers.sharding is deepspeed, which is not installed: pip install -e '.[application,deepspeed]', or set fsdp"
        )
    gpus, cpus = torch.cuda.device_count(), os.cpu_count() or 1
    if workers.num_gpus > gpus:
        found = "no GPU" if gpus == 0 else f"{gpus} GPU{'s' if gpus > 1 else ''}"
        problems.append(
            f"workers.num_gpus is {workers.num_gpus:g}, but there is {found} here and cluster.address is not set: give the "
            "address of a cluster, or run on a machine with GPUs, or set workers.num_gpus to 0 to run on the CPU"
        )
    elif workers.num_gpus * workers.gpus_per_replica > gpus:
        problems.append(
            f"workers.gpus_per_replica is {workers.gpus_per_replica}, but there are {gpus} GPUs here and cluster.address is "
            "not set: lower it (with workers.offload: cpu if the model does not fit), or give the address of a cluster"
        )
    if workers.num_gpus == 0 and workers.gpus_per_replica * config.numerics.threads > cpus >= config.numerics.threads:
        problems.append(
            f"workers.gpus_per_replica is {workers.gpus_per_replica}, but this machine has {cpus} CPU cores for processes of "
            f"numerics.threads {config.numerics.threads}: lower it"
        )
    if config.numerics.threads > cpus:
        problems.append(
            f"numerics.threads is {config.numerics.threads}, but this machine has {cpus} CPU cores: no worker fits; lower it"
        )
    return problems


def worker_notes(config: RunConfig) -> list[str]:
    """What works, but otherwise than it reads."""
    wanted, cpus, gpus = config.workers.num_workers, os.cpu_count() or 1, torch.cuda.device_count()
    if wanted == "auto" or is_remote(config):
        return []
    room = cpus // config.numerics.threads
    if config.workers.num_gpus > 0:
        room = min(room, int(gpus / config.workers.num_gpus))
    if wanted <= max(room, 1):
        return []
    return [
        f"workers.num_workers is {wanted}, but this machine has room for {max(room, 1)} ({cpus} CPU cores, {gpus} GPUs): "
        "so many run at once"
    ]


def is_remote(config: RunConfig) -> bool:
    """Whether the run's workers are on a cluster."""
    return config.cluster.address not in (None, "local") or bool(os.environ.get("RAY_ADDRESS"))
