"""What driver and workers say to each other: frozen, small, and free of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reelquant.attention.sparse_spec import ResidualSpec, SparseAttentionSpec
from reelquant.calibration.recipe import LayerBits, Recipe
from reelquant.checkpoint.inference_specs import StepProtection, VelocityCorrection
from reelquant.ops.band_attention.op import Precision
from storage.location import Location
from storage.manifest import OutputFile
from workers.candidates import FEATURES
from workers.hub_snapshot import HubSnapshot
from workers.usage import Usage

Progress = Callable[[int, int], None]
"""Called by a worker with (done, total) while it works on a unit."""


@dataclass(frozen=True)
class UnitOutput:
    """What a finished unit hands to the driver, which writes it into the manifest."""

    outputs: tuple[OutputFile, ...]
    result: Mapping[str, Any]
    """Small and JSON-serializable."""
    device: str
    peak_memory_bytes: int
    """Of the worker process (resident set), or of the GPU where there is one."""
    usage: Usage | None = None
    """What the unit took, by who ran it."""
    lean: bool = False
    """Whether it was done with less memory than usual, by who ran it; the outputs are the same."""


@dataclass(frozen=True)
class Numerics:
    """What decides the bytes of a result besides its inputs."""

    dtype: str
    """`float32`, `bfloat16`, or `auto`: bfloat16 on a GPU, float32 on a CPU."""
    threads: int
    """CPU threads of one worker. The number of workers changes no result; this one may."""
    deterministic: bool = False
    """On a GPU: gradients by deterministic kernels."""


@dataclass(frozen=True)
class Generation:
    """Arguments of the diffusers pipeline's call."""

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int


@dataclass(frozen=True)
class Sharding:
    """How the workers of a replica hold the full-precision transformer. Changes no result."""

    kind: str = "none"
    """`none`: every worker has all of it; `fsdp` or `deepspeed`: the workers of a replica share it."""
    offload: str = "none"
    """Where the shards are while they are not used: `none` (on the device), `cpu`, or `nvme` (DeepSpeed only)."""
    offload_path: Path | None = None
    """Folder for `nvme`."""


@dataclass(frozen=True)
class RunSource:
    """Where a worker reads and writes, and which model it is about."""

    run: Location
    model: Path | HubSnapshot
    """A folder that every node sees, or what every node fetches: `hub_snapshot.model_folder` gives its folder."""
    seed: int
    numerics: Numerics
    variant: str | None = None
    """Of the model's weight files, such as `fp16`."""


@dataclass(frozen=True)
class TrajectorySettings:
    """Of every trajectory worker."""

    source: RunSource
    generation: Generation
    weight_bits: int
    """At which the feature `weight_error` rounds the weights."""
    salience_tokens: int
    """Tokens per layer from which `weight_error` is estimated, evenly spaced."""
    sharding: Sharding = Sharding()
    features: tuple[str, ...] = FEATURES
    """Which kinds of quantization salience to record."""


@dataclass(frozen=True)
class PromptUnit:
    """One prompt; its name is the unit's."""

    name: str
    prompt: str


@dataclass(frozen=True)
class SelectionSettings:
    """Of the selection."""

    source: RunSource
    strategy: str
    quantization_feature: str
    """One of `features`."""
    num_samples: int
    features: tuple[str, ...] = FEATURES
    """What the trajectories have recorded."""
    diffusion_feature: str = "latent"
    """Whose change the diffusion salience is (`reelquant.calibration.salience.diffusion_features`)."""
    sigmas: tuple[float, ...] = ()
    """`[T + 1]` of the trajectories' latents; empty for `latent`, whose salience the trajectories have recorded."""


@dataclass(frozen=True)
class SelectionUnit:
    """All trajectories, in order."""

    name: str
    prompts: tuple[PromptUnit, ...]


@dataclass(frozen=True)
class ActivationSettings:
    """Of every activation worker."""

    source: RunSource
    generation: Generation
    boundaries: tuple[str, ...]
    """Blocks in front of which the stream is stored: the first block of every segment."""
    sharding: Sharding = Sharding()


@dataclass(frozen=True)
class SampleUnit:
    """One chosen candidate."""

    name: str
    prompt_name: str
    step: int


@dataclass(frozen=True)
class InferencePlan:
    """What a method decides of the generation, besides what its blocks are calibrated for."""

    online_head_kinds: bool = False
    dense_above: float = 1.0
    interval: int = 5
    refresh_at: tuple[float, ...] = ()
    residual: ResidualSpec = field(default_factory=ResidualSpec)
    precision: Precision = "full"
    protection: StepProtection | None = None

    def to_dict(self) -> dict[str, Any]:
        """What it decides, for fingerprints: settings that are not used are left out, as from before there were any."""
        values = {**asdict(self), "residual": self.residual.to_dict()}
        if not self.refresh_at:
            del values["refresh_at"]
        return values


@dataclass(frozen=True)
class MethodPlan:
    """One calibration method and the bits of all its layers."""

    name: str
    recipe: Recipe
    bits: Mapping[str, LayerBits]
    """By full layer name; a linear without an entry stays in 16 bits."""
    inference: InferencePlan = InferencePlan()
    drift_repair: bool = False
    velocity_correction: bool = False
    calibrated_gain: bool = False
    """Whether the gain of its residual is measured."""
    placed_refreshes: bool = False
    """Whether its refreshes lie where the measured residual drifts most."""

    @property
    def measures_residual(self) -> bool:
        """Whether the drift of its residual is measured."""
        return self.calibrated_gain or self.placed_refreshes

    @property
    def is_refined(self) -> bool:
        """Whether it has a unit in the stage refinement."""
        return self.drift_repair or self.velocity_correction or self.measures_residual


@dataclass(frozen=True)
class DistillationSettings:
    """Of every distillation worker."""

    source: RunSource
    samples: tuple[SampleUnit, ...]
    prompts: tuple[PromptUnit, ...]
    fall_back: bool


@dataclass(frozen=True)
class SegmentUnit:
    """One segment of one method: consecutive blocks. Without blocks: the linears outside the blocks."""

    name: str
    method: MethodPlan
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class RefinementSettings:
    """Of every refinement worker."""

    source: RunSource
    generation: Generation
    samples: tuple[SampleUnit, ...]
    prompts: tuple[PromptUnit, ...]


@dataclass(frozen=True)
class RefinementUnit:
    """One method whose blocks are all calibrated."""

    name: str
    method: MethodPlan
    artifacts: tuple[str, ...]
    """Paths in the run directory."""
    sparse_attention: SparseAttentionSpec | None = None


@dataclass(frozen=True)
class AssemblySettings:
    """Of the assembly."""

    source: RunSource
    max_shard_bytes: int
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, written into the checkpoint's config."""


@dataclass(frozen=True)
class AssemblyUnit:
    """One method's checkpoint."""

    name: str
    method: MethodPlan
    bits_label: str
    artifacts: tuple[str, ...]
    """Paths in the run directory."""
    checkpoint: str
    sparse_attention: SparseAttentionSpec | None = None
    velocity_correction: VelocityCorrection | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """Of every evaluation worker."""

    source: RunSource
    generation: Generation
    recognizer: Path | None
    films: bool = True
    sharding: Sharding = Sharding()
    """Of the full-precision model."""
    film_fps: int = 24
    """Frames a second of the films."""
    seed: int = 0
    """Of the noises of the held-out prompts."""


@dataclass(frozen=True)
class EvaluationUnit:
    """One held-out prompt with one model."""

    name: str
    prompt: PromptUnit
    checkpoint: str | None
    """Path in the run directory; None is the full-precision model."""
    setting: str | None = None
    """Name of the setting of the checkpoint; None for the checkpoint as it is."""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """What that changes: arguments of `SparseAttention.configure`."""
    noise_floor: bool = False
    """Compare the full-precision model in bfloat16 with itself under another attention backend, and store no video."""
    reference: str | None = None
    """Name in the calibration store of the full-precision video of the same noise; None where there is nothing to compare."""
    compare_latents: bool = False
    """Compare the latents of every step too."""
    keep_latents: bool = False
    """Store the latents of every step: the full-precision model's, to which others are compared."""
    keep_velocity: bool = False
    """Store the velocities of every step too, for teacher-forced passes."""


@dataclass(frozen=True)
class VelocityUnit:
    """A teacher-forced pass of one model over the stored trajectories of some held-out prompts, all in one call."""

    name: str
    prompts: tuple[PromptUnit, ...]
    trajectories: tuple[str, ...]
    """Names of their arrays in the calibration store."""
    checkpoint: str | None
    """Path in the run directory; None is the noise floor: the full-precision model in bfloat16 under another attention
    backend."""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """As of `EvaluationUnit`."""


@dataclass(frozen=True)
class StepWeightsUnit:
    """How much an error of each step weighs in the final latents of the full-precision model."""

    name: str
    prompts: tuple[PromptUnit, ...]
    """Whose trajectories are perturbed."""
    trajectories: tuple[str, ...]
    """Names of their arrays in the calibration store."""
    steps: tuple[int, ...]
    """Perturbed ones; the weights of those between are interpolated."""
    rows: int
    """Roll-outs at once."""
