"""What every worker process does first, and what it can say about itself."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from reelquant.settings.generation import Numerics
from workers.library_messages import quieten_libraries

_STATUS = Path("/proc/self/status")


def prepare_process(numerics: Numerics) -> tuple[torch.device, torch.dtype]:
    """Fixes threads and determinism, quietens libraries; returns the device and the dtype of weights and activations."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    quieten_libraries()
    _reset_peak_memory()
    torch.set_num_threads(numerics.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # An operation without a deterministic kernel warns on a GPU instead of ending the run.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    # torch would also fill with NaN whatever is allocated: 3 to 7 % of a learning step (H200).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}
    return device, dtypes[numerics.dtype]


@contextlib.contextmanager
def deterministic_kernels(*, asked: bool) -> Iterator[None]:
    """On a GPU, deterministic kernels alone, if `asked`: the same gradients every time.

    Where determinism is only wished for (`prepare_process`), torch's attention adds its gradients up in the order in which
    thread blocks end; it has deterministic kernels too, and takes them where anything else is an error.

    Raises, inside:
        RuntimeError: an operation has no deterministic kernel.
    """
    if not (asked and torch.is_deterministic_algorithms_warn_only_enabled()):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def unit_seed(seed: int, *parts: str) -> int:
    """A unit's own seed from the run's: 63 bits of a hash, the same on every machine."""
    digest = hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def device_name(device: torch.device) -> str:
    """Readable name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def peak_memory_bytes(device: torch.device) -> int:
    """Largest GPU memory allocated since `prepare_process`, or largest resident set of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Gives back what a dropped worker held: to the system, and to others on the GPU. Otherwise the next worker of the process
    would count it as its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak_memory() -> None:
    """A process serves several stages: each has its own peak. Where Linux forbids the reset, peaks add up."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
