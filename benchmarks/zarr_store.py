"""Rates of the calibration store beside plain files, on one disk, in one run.

    python -m benchmarks.zarr_store --output benchmarks/results/zarr_store.json

Eight samples of [8192, 3072] and one of [57600, 3072], bf16, are written and read through

- ``store``: ``UnitStore`` (Zarr v3 through ``zarr``, crc32c a chunk, checked for NaN, SHA-256 of every file, synced;
  reads verify every crc32c and look for NaN),
- ``plain``: one file per sample, one ``write``, file and directory synced; read with ``numpy.fromfile``, unverified.

Write rates are to disk (fsync on both sides). The same is written untimed right before: memory that a virtual machine gave back
to its host costs more to touch than a write. Reads are warm (page cache) and cold (the files' pages dropped before). One round
warms up, five count; the order within a round rotates. MB are 10^6 bytes.
"""

import os
import platform
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.harness import environment, parser, write_record
from storage.atomic_files import create_directory, sync_directory
from storage.unit_store import UnitAddress, UnitStore

WORKLOADS = {"8 x [8192, 3072]": (8, (8192, 3072)), "1 x [57600, 3072]": (1, (57600, 3072))}
QUICK_WORKLOADS = {"2 x [1500, 3072]": (2, (1500, 3072))}


class PlainFiles:
    """One raw file per sample."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, tensor: torch.Tensor) -> None:
        descriptor = os.open(self.root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        view = tensor.view(torch.uint8).numpy().reshape(-1).data
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
        os.close(descriptor)
        sync_directory(self.root)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(np.fromfile(self.root / name, np.uint16)).view(torch.bfloat16).reshape(shape)


class Store:
    """The outputs of units of one sample."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, tensor: torch.Tensor) -> None:
        address = UnitAddress(self.root / "cache", self.root, "activations", name, name)
        self.stores[self.root, name] = store = UnitStore(address).__enter__()
        store.write(f"activations/{name}/stream", tensor)
        store.publish()

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.stores[self.root, name].read(f"activations/{name}/stream")

    stores: ClassVar[dict[tuple[Path, str], UnitStore]] = {}
    """Those that have written last, which read what they wrote."""


Contender = PlainFiles | Store
CONTENDERS: dict[str, type[Contender]] = {"plain": PlainFiles, "store": Store}


def measure(folder: Path, samples: list[torch.Tensor], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every counted round: ``{"write" | "read_warm" | "read_cold": {contender: [s, ...]}}``."""
    seconds: dict[str, dict[str, list[float]]] = {}
    names = list(CONTENDERS)
    for repeat in range(repeats + 1):
        order = names[repeat % len(names) :] + names[: repeat % len(names)]
        for phase, prepare in (("write", rewritten), ("read_warm", verified), ("read_cold", dropped)):
            action = write_all if phase == "write" else read_all
            for name in order:
                contender = prepare(folder / name, samples)
                os.sync()
                begin = time.perf_counter()
                action(contender, samples)
                elapsed = time.perf_counter() - begin
                if repeat:
                    seconds.setdefault(phase, {}).setdefault(name, []).append(elapsed)
    return seconds


def rewritten(folder: Path, samples: list[torch.Tensor]) -> Contender:
    """An empty place, where the samples were written and removed a moment ago."""
    contender = CONTENDERS[folder.name](fresh_folder(folder))
    write_all(contender, samples)
    fresh_folder(folder)
    return contender


def verified(folder: Path, samples: list[torch.Tensor]) -> Contender:
    """A place whose files were read, and are in the page cache."""
    contender = CONTENDERS[folder.name](folder)
    read_all(contender, samples, verify=True)
    return contender


def dropped(folder: Path, _samples: list[torch.Tensor]) -> Contender:
    """A place whose files are not in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return CONTENDERS[folder.name](folder)


def write_all(contender: Contender, samples: list[torch.Tensor]) -> None:
    for number, sample in enumerate(samples):
        contender.write(f"sample-{number}", sample)


def read_all(contender: Contender, samples: list[torch.Tensor], *, verify: bool = False) -> None:
    for number, sample in enumerate(samples):
        back = contender.read(f"sample-{number}", tuple(sample.shape))
        if verify and not torch.equal(back.view(torch.int16), sample.view(torch.int16)):
            raise SystemExit(f"{type(contender).__name__} did not return what was written: sample {number}")


def fresh_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    create_directory(path)
    return path


def summarize(seconds: dict[str, dict[str, list[float]]], num_bytes: int) -> dict[str, Any]:
    """Rates, spread and shares of one workload."""
    summary: dict[str, Any] = {}
    for phase, by_name in seconds.items():
        rates = {name: [num_bytes / 1e6 / s for s in rounds] for name, rounds in by_name.items()}
        medians = {name: statistics.median(rounds) for name, rounds in rates.items()}
        summary[phase] = {
            name: {
                "median_mb_per_s": round(medians[name]),
                "min_mb_per_s": round(min(rounds)),
                "max_mb_per_s": round(max(rounds)),
                "all_mb_per_s": [round(rate) for rate in rounds],
                "share_of_plain": round(medians[name] / medians["plain"], 3),
                "share_of_plain_best_rounds": round(max(rounds) / max(rates["plain"]), 3),
            }
            for name, rounds in rates.items()
        }
    return summary


def machine(disk: str) -> dict[str, Any]:
    """Hardware, versions and file system."""
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in cpu_lines if line.startswith("model name")]
    return environment(torch.device("cpu")) | {
        "cpu": cpu[0] if cpu else platform.processor(),
        "num_cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        **{name: version(name) for name in ("numpy", "zarr")},
        "file_system": disk,
    }


def cpu_seconds() -> tuple[float, float]:
    """CPU seconds so far: of the whole machine (all but idle and I/O wait), and of this process."""
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    own = resource.getrusage(resource.RUSAGE_SELF)
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own.ru_utime + own.ru_stime


def file_system(path: Path) -> str:
    command = ["stat", "--file-system", "--format=%T", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(given: list[str] | None = None) -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--directory", type=Path, default=Path("runs"), help="where to write, on the disk to measure")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--quick", action="store_true", help="one small workload: shows that it works, no figures")
    arguments = options.parse_args(given)

    create_directory(arguments.directory)
    generator = torch.Generator().manual_seed(0)
    results, cpus_elsewhere = {}, {}
    with tempfile.TemporaryDirectory(prefix="zarr-store-", dir=arguments.directory) as folder:
        disk = file_system(Path(folder))
        for label, (count, shape) in (QUICK_WORKLOADS if arguments.quick else WORKLOADS).items():
            samples = [torch.randn(shape, generator=generator).bfloat16() for _ in range(count)]
            begin, (busy_before, own) = time.perf_counter(), cpu_seconds()
            seconds = measure(Path(folder), samples, arguments.repeats)
            elapsed, (busy_after, own_after) = time.perf_counter() - begin, cpu_seconds()
            results[label] = summarize(seconds, sum(sample.nbytes for sample in samples))
            cpus_elsewhere[label] = round((busy_after - busy_before - own_after + own) / elapsed, 2)
            for phase, rows in results[label].items():
                for name, row in rows.items():
                    share = f"{row['share_of_plain']:.0%} of plain (best: {row['share_of_plain_best_rounds']:.0%})"
                    print(f"{label:>18}  {phase:<9}  {name:<5}  {row['median_mb_per_s']:>6} MB/s  {share}")
    # Kernel threads that write out, and whatever else ran on the machine.
    busy = {"mean_cpus_busy_elsewhere": cpus_elsewhere}
    write_record(arguments.output, machine(disk), {"repeats": arguments.repeats}, **busy, results=results)


if __name__ == "__main__":
    main()
