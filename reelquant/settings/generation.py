"""Bits, numerics, and one generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from reelquant.settings.declaration import Bounds, Settings


@dataclass(frozen=True)
class LayerBits(Settings):
    """Bits of one linear layer, or of one kind of layers."""

    weight: Annotated[int, Bounds(ge=2, le=8)] | Literal[16] = 4
    """2-8, or 16 to leave the layer as it is."""
    activation: int = 16
    """4-8, or 16 for activations that are not quantized."""

    def __post_init__(self) -> None:
        check_activation_bits(self.activation)


def check_activation_bits(value: int) -> None:
    """Raises ValueError for a number of bits that activations cannot have."""
    if not (4 <= value <= 8 or value == 16):
        raise ValueError(f"activation bits are {value}; 4 to 8, or 16 for activations that stay as they are")


@dataclass(frozen=True)
class StepProtection(Settings):
    """Steps with finer activations (method §9.3); `step_protection` of a checkpoint."""

    NEEDED = frozenset({"noise_above"})
    SECTION = "step_protection"

    noise_above: Annotated[float, Bounds(ge=0, le=1)]
    """Steps whose noise level lies above it are protected: in [0, 1], where 0 are all steps and 1 none."""
    activation_bits: int = 8
    """Of layers that otherwise have fewer, 4-8, or 16 for none; at those steps only."""

    def __post_init__(self) -> None:
        if problems := self.impossible_values():
            raise ValueError(f"step_protection: {'; '.join(problems)}")
        if not (4 <= self.activation_bits <= 8 or self.activation_bits == 16):
            raise ValueError(f"step_protection: activation_bits is {self.activation_bits}; 4 to 8, or 16 for none")

    def bits_at(self, noise_level: float) -> int | None:
        """Fewest activation bits at a noise level; None where the step is not protected."""
        return self.activation_bits if noise_level > self.noise_above else None


@dataclass(frozen=True)
class Generation(Settings):
    """Arguments of the diffusers pipeline's call."""

    height: Annotated[int, Bounds(ge=16)] = 720
    """Pixels; a multiple of what VAE and patches compress, which `plan` says."""
    width: Annotated[int, Bounds(ge=16)] = 1280
    """Pixels, as the height."""
    num_frames: Annotated[int, Bounds(ge=1)] = 61
    """`n k + 1` where the VAE compresses time n times; `plan` says which."""
    num_inference_steps: Annotated[int, Bounds(ge=2)] = 50
    """Denoising steps: the candidates of one prompt."""
    guidance_scale: float = 6.0
    """Guidance by the prompt; by models without embedded guidance with a second call a step."""
    max_sequence_length: Annotated[int, Bounds(ge=1)] = 256
    """Text tokens at most."""

    def __post_init__(self) -> None:
        if problems := self.impossible_values("generation."):
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Numerics(Settings):
    """Settings that decide a result's bytes besides its inputs."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the model: `auto` is bfloat16 on GPUs, float32 on CPUs."""
    threads: Annotated[int, Bounds(ge=1)] = 1
    """CPU threads of one worker. The number of workers changes no byte, this may."""
    deterministic: bool = False
    """On GPUs: a segment distilled twice has the same bytes. Otherwise its gradients, and so what it learns, differ in their
    last digits from time to time, as the attention's backward pass adds up in any order. A learning step takes 1.25 to 1.45
    times as long (HunyuanVideo-13B at 480 and 720 lines). On CPUs it is always so; without learning, on GPUs too."""

    def __post_init__(self) -> None:
        if problems := self.impossible_values("numerics."):
            raise ValueError("; ".join(problems))
