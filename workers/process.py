"""What every worker process does first, and what it can say about itself."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import sys

import torch

from workers.messages import Numerics


def prepare_process(numerics: Numerics) -> tuple[torch.device, torch.dtype]:
    """Fixes threads and determinism; returns the device and the dtype of the model's weights and activations."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(numerics.threads)
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}
    return device, dtypes[numerics.dtype]


def unit_seed(seed: int, *parts: str) -> int:
    """A unit's own seed from the run's: 63 bits of a hash, the same on every machine."""
    digest = hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def device_name(device: torch.device) -> str:
    """Readable name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def peak_memory_bytes(device: torch.device) -> int:
    """Largest GPU memory allocated so far, or largest resident set of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
