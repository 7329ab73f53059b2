"""Makes the allocations of a process fail for real: the system, or CUDA's allocator, refuses them."""

import resource

import psutil
import torch

from workers.process import release_memory

LIMITS = "REELQUANT_TEST_LIMITS"
"""Environment variable: JSON, MiB by name of a unit."""


def limit_memory(more_mib: int | None) -> None:
    """Lets this process have so much more memory of its own than it needs now, or GPU memory where there is a GPU."""
    release_memory()
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        allowed = total if more_mib is None else torch.cuda.memory_allocated() + more_mib * 2**20
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        return
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    allowed = most if more_mib is None else psutil.Process().memory_info().data + more_mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, most))
