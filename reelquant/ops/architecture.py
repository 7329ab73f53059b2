"""What a GPU has that kernels need, found once a device; every dispatch and every launch of a Triton kernel asks here.

| card | capability | shared memory of a program | wgmma | TMA | e4m3 | INT8 |
|---|---|---|---|---|---|---|
| A100, A800 | 8.0 | 163 KiB | - | - | - | yes |
| RTX 3090, A6000 | 8.6 | 99 KiB | - | - | - | yes |
| RTX 4090, L40S | 8.9 | 99 KiB | - | - | yes | yes |
| H100, H200 | 9.0 | 227 KiB | yes | yes | yes | yes |
| B200, B300 | 10.0, 10.3 | 227 KiB | - | yes | yes | yes, slow on B300 |
| RTX 5090, RTX PRO 6000, Spark | 12.0, 12.1 | 99 KiB | - | yes | yes | yes |
| MI300X and other GPUs under HIP | - | 64 KiB | - | - | - | - |

Kernels run on NVIDIA GPUs of capability 8.0 to 12.x where their shared memory fits; those that multiply INT8 or e4m3 only
where `wgmma` is, on Hopper: elsewhere Triton compiles them to something slow or to nothing (measured ahead of time). A card
beyond this table takes torch's own operations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Architecture", "Feature", "Needs", "architecture", "current_stream", "launching"]

Feature = Literal["wgmma", "tma", "e4m3", "int8"]

OLDEST, NEWEST = (8, 0), (12, 9)
"""Compute capabilities for which the kernels are compiled ahead of time in tests."""
_RESERVED_BYTES = 1024
"""Shared memory that CUDA keeps of each program from capability 8.0 on."""
_MADE_OF = {
    "wgmma": "products of warp groups (wgmma, Hopper)",
    "tma": "a tensor memory accelerator",
    "e4m3": "products of e4m3",
    "int8": "products of INT8",
}


@dataclass(frozen=True)
class Needs:
    """What a kernel asks of a GPU beside a compute capability from `OLDEST` to `NEWEST`."""

    features: tuple[Feature, ...] = ()
    shared_kib: int = 0
    """Shared memory of a program, at most."""


@dataclass(frozen=True)
class Architecture:
    """One GPU, as kernels see it."""

    name: str
    capability: tuple[int, int]
    """CUDA compute capability; under HIP whatever torch says, which nothing reads."""
    is_hip: bool
    """`torch.version.hip` is set."""
    shared_bytes: int
    """Shared memory that one program may take."""
    num_multiprocessors: int
    has_wgmma: bool
    """Products of warp groups, of Hopper alone."""
    has_tma: bool
    """A tensor memory accelerator."""
    has_e4m3: bool
    """Tensor cores multiply e4m3."""
    has_int8: bool
    """Tensor cores multiply INT8, for `torch._int_mm` too."""

    @classmethod
    def of(
        cls, name: str, capability: tuple[int, int], *, is_hip: bool, shared_bytes: int, num_multiprocessors: int
    ) -> Architecture:
        """What follows from a GPU's capability and from whether it runs under CUDA."""
        return cls(
            name,
            capability,
            is_hip,
            shared_bytes,
            num_multiprocessors,
            has_wgmma=not is_hip and capability[0] == 9,
            has_tma=not is_hip and capability >= (9, 0),
            has_e4m3=not is_hip and capability >= (8, 9),
            has_int8=not is_hip and capability >= (8, 0),
        )

    def obstacle(self, needs: Needs) -> str | None:
        """Why a Triton kernel with these needs cannot run, None if it can."""
        if self.is_hip:
            return f"the kernels are for NVIDIA GPUs, {self.name} runs under HIP"
        if not OLDEST <= self.capability <= NEWEST:
            return f"it needs compute capability {_dotted(OLDEST)} to {_dotted(NEWEST)}, {self._described()}"
        missing = [_MADE_OF[feature] for feature in needs.features if not getattr(self, f"has_{feature}")]
        if missing:
            return f"it needs {' and '.join(missing)}, {self._described()}"
        if needs.shared_kib * 1024 > self.shared_bytes:
            return (
                f"it needs {needs.shared_kib} KiB of shared memory, "
                f"{self.name} gives a program {self.shared_bytes / 1024:g} KiB"
            )
        return None

    def fits(self, shared_kib: int) -> bool:
        """Whether a program may take so much shared memory."""
        return shared_kib * 1024 <= self.shared_bytes

    def _described(self) -> str:
        return f"{self.name} has capability {_dotted(self.capability)}"


INTERPRETER = Architecture.of(
    "Triton's interpreter", (0, 0), is_hip=False, shared_bytes=2**31 - 1, num_multiprocessors=4
)
"""Of tensors on a CPU, for which Triton interprets kernels; any number of multiprocessors does."""


def architecture(device: torch.device) -> Architecture:
    """Of a device that is there; `INTERPRETER` for what is no GPU."""
    if device.type != "cuda":
        return INTERPRETER
    return _found(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _found(index: int) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    is_hip = torch.version.hip is not None
    shared = properties.shared_memory_per_block
    if not is_hip:
        shared = max(shared, properties.shared_memory_per_multiprocessor - _RESERVED_BYTES)
    return Architecture.of(
        properties.name,
        (properties.major, properties.minor),
        is_hip=is_hip,
        shared_bytes=shared,
        num_multiprocessors=properties.multi_processor_count,
    )


def launching(x: Tensor, shared_kib: int = 0) -> AbstractContextManager[Any]:
    """Makes the device of `x` the current one, around each launch of a Triton kernel: Triton launches on the current one.

    Raises: ValueError where a program's shared memory does not fit the device.
    """
    if not x.is_cuda:
        return nullcontext()
    found = architecture(x.device)
    if not found.fits(shared_kib):
        raise ValueError(found.obstacle(Needs(shared_kib=shared_kib)))
    return torch.cuda.device(x.device)


def current_stream(device: torch.device) -> int:
    """Handle of the stream on which `device` works for this thread, 0 for a CPU.

    It is a part of the key of every tensor that is made once and kept: another stream, which would not wait for the one that
    makes or frees the tensor, gets a tensor of its own.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
