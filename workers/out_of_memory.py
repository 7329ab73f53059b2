"""A unit that ran out of memory: how that is recognized, and what is said of it.

The pool (`cluster.actor_pool`) has the unit done again in the same process, whose `SharedWorker` then gives back all it can and
tells the unit's worker to take less (`save_memory`); then in a new process, where no memory is in pieces; then it is set aside.
"""

from __future__ import annotations

import errno
import os
import re
import resource

import psutil
import torch

from workers.process import device_name

GENERATION_ADVICE = (
    "one worker a GPU (workers.num_gpus: 1); a GPU with more memory; a smaller video (generation.height, generation.width, "
    "generation.num_frames; everything is then made anew)"
)
"""Ways out where a model runs as a whole."""
SHARDING_ADVICE = (
    "share the full-precision model among GPUs, or more of them (workers.sharding: fsdp or deepspeed, "
    "workers.gpus_per_replica: 2 or more), or keep it in host memory as well (workers.offload: cpu); "
)
"""Where that model is the full-precision one, these too; they change no result."""
_SIGNS = re.compile(
    r"can't allocate memory|not enough memory|bad_alloc"
    r"|CUDA(?: error:)? out of memory|CU(?:BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED"
    r"|Cuda failure (?:\d+ )?'out of memory'|Failed to CUDA (?:m|c)alloc"  # NCCL, which has buffers of its own
)
_ASKED = re.compile(
    r"(?:[Tt]ried to allocate|[Uu]nable to allocate|Failed to CUDA (?:m|c)alloc(?: async)?) ([\d.]+) (bytes|[KMGT]iB)"
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class OutOfMemory(MemoryError):
    """A unit ran out of memory; the message has everything that is known of it, in one line."""

    def __init__(self, message: str, *, saved_memory: bool) -> None:
        super().__init__(message)
        self.saved_memory = saved_memory
        """Whether it was done with less memory already."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised from, says that there was too little memory."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and _SIGNS.search(str(error)):
            return True
        error = error.__cause__
    return False


def out_of_memory(
    unit: str, error: BaseException, *, advice: str, lean: bool, planned_bytes: int | None = None
) -> OutOfMemory:
    """What is raised instead of `error`; called before anything is given back.

    Args:
        unit: stage and name.
        advice: ways out, besides those of the device.
        lean: the unit was done with less memory already.
        planned_bytes: what `plan` says one worker of the stage takes.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    asked = _asked_bytes(error)
    told = [
        f"asked for {_text(asked)}" if asked is not None else f"an allocation failed ({_one_line(error)})",
        _gpu_text(device) if on_gpu else _process_text(),
        f"the plan says {_text(planned_bytes)} a worker"
        if planned_bytes is not None
        else "`python -m pipeline plan` says what it takes",
    ]
    how = " although it saved memory" if lean else ""
    own = "" if on_gpu else "fewer workers at once (workers.num_workers); a machine with more memory; "
    name = f"{device_name(device)} ({device})" if on_gpu else device_name(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # of a replica, where every rank calls its GPU the first
        name = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, {name}"
    message = f"{unit} ran out of memory on {name}{how}: {'; '.join(told)}. Ways out: {own}{advice}"
    return OutOfMemory(message, saved_memory=lean)


def _asked_bytes(error: BaseException | None) -> int | None:
    while error is not None:
        if found := _ASKED.search(str(error)):
            return int(float(found[1]) * _UNITS[found[2]])
        error = error.__cause__
    return None


def _gpu_text(device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return (
        f"{_text(free)} of {_text(total)} were free; this process held {_text(reserved)}, "
        f"{_text(reserved - held)} of it in pieces that no tensor used"
    )


def _process_text() -> str:
    used = psutil.Process().memory_info()
    told = f"{_text(psutil.virtual_memory().available)} of {_text(psutil.virtual_memory().total)} were free"
    for name, which, now in (
        ("RLIMIT_AS", resource.RLIMIT_AS, used.vms),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, used.data),
    ):
        limit = resource.getrlimit(which)[0]
        if limit != resource.RLIM_INFINITY:
            told += f", {name} lets this process have {_text(limit)} and it had {_text(now)}"
    return told


def _text(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
