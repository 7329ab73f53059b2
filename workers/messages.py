"""What driver and workers say to each other: frozen, small, and free of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.checkpoint.inference_specs import VelocityCorrection
from reelquant.checkpoint.reader import TRANSFORMER
from reelquant.noise_schedule import threshold_after
from reelquant.settings.generation import Generation, LayerBits, Numerics, StepProtection
from reelquant.settings.recipe import Recipe
from storage.output_file import OutputFile
from workers.candidates import FEATURES
from workers.hub_snapshot import HubSnapshot
from workers.sharding import Sharding
from workers.usage import Usage

FILM = "film.mp4"
"""Output of an evaluation for people."""

Progress = Callable[[int, int], None]
"""Called by a worker with (done, total) while it works on a unit."""


@dataclass(frozen=True)
class UnitOutput:
    """What a finished unit hands to the driver, which records it."""

    result: Mapping[str, Any]
    """Small and JSON-serializable."""
    device: str
    peak_memory_bytes: int
    """Of the worker process (resident set), or of the GPU where there is one."""
    usage: Usage | None = None
    """What the unit took, by who ran it."""
    lean: bool = False
    """Whether it was done with less memory than usual, by who ran it; the outputs are the same."""
    outputs: tuple[OutputFile, ...] = ()
    """Files that it wrote, by who ran it; so is `attempt`, their folder in the cache (None: they are the run's own)."""
    attempt: str | None = None


@dataclass(frozen=True)
class RunSource:
    """Which model a worker is about, and how it computes."""

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
    served: tuple[str, ...] = ()
    """Transformer that serves each step, as the schedule says; empty for one that serves all."""


@dataclass(frozen=True)
class PromptUnit:
    """One prompt; its name is the unit's."""

    name: str
    prompt: str
    negative_prompt: str | None = None
    image: bytes | None = field(default=None, repr=False)
    """Contents of the image's file (`workers.images`)."""

    @property
    def without_image(self) -> PromptUnit:
        """The same for units that generate nothing."""
        return replace(self, image=None)

    def to_dict(self) -> dict[str, str]:
        """JSON values that decide a generation, for fingerprints; absent ones are left out."""
        image = None if self.image is None else hashlib.sha256(self.image).hexdigest()
        values = {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "image": image}
        return {name: value for name, value in values.items() if value is not None}


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
    pools: tuple[tuple[int, ...], ...] = ()
    """Steps that each transformer serves, among which its `num_samples` are chosen; empty for one that serves all."""


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
    role: str = TRANSFORMER
    """Component that serves the step."""


@dataclass(frozen=True)
class MethodPlan:
    """One calibration method and the bits of all its layers."""

    recipe: Recipe
    bits: Mapping[str, LayerBits]
    """By full layer name; a linear without an entry stays in 16 bits."""
    attention: SparseAttentionSpec = field(default_factory=SparseAttentionSpec)
    """Of the recipe, on the run's model and schedule; without what the calibration finds out."""
    protection: StepProtection | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        bits: Mapping[str, LayerBits],
        noise_levels: Sequence[float],
        blocks: tuple[str, ...],
        dense_frames: int = 0,
    ) -> MethodPlan:
        """A recipe on a model with these blocks, in model order; its first steps are those of a generation with these noise
        levels."""
        protected = recipe.num_protected_steps(len(noise_levels))
        protection = StepProtection(threshold_after(protected, noise_levels), recipe.protected_activation_bits)
        attention = SparseAttentionSpec.of(
            recipe.attention, noise_levels=noise_levels, blocks=blocks, dense_frames=dense_frames
        )
        return cls(recipe, bits, attention, protection if protected else None)

    @property
    def name(self) -> str:
        """Of folders and tables."""
        return self.recipe.name

    def generation_values(self) -> dict[str, Any]:
        """JSON values that decide the generation, besides the blocks' calibration, for fingerprints."""
        values = self.attention.to_dict()
        online = values.pop("online")
        for calibrated in ("density", "head_kinds", "dense_blocks"):
            del values[calibrated]
        protection = None if self.protection is None else self.protection.to_dict()
        return {**values, "online_head_kinds": online, "protection": protection}


@dataclass(frozen=True)
class DistillationSettings:
    """Of every distillation worker."""

    source: RunSource
    samples: tuple[SampleUnit, ...]
    prompts: tuple[PromptUnit, ...]
    fall_back: bool
    branches: tuple[str, ...] = ("cond",)
    """Recorded calls of every sample (`workers.generation.branches`)."""


@dataclass(frozen=True)
class SegmentUnit:
    """One segment of one method: consecutive blocks. Without blocks: the linears outside the blocks."""

    name: str
    method: MethodPlan
    blocks: tuple[str, ...]
    entry: str | None = None
    """Block whose stored stream they read; None: the first of them."""
    role: str = TRANSFORMER
    """Component that they are blocks of."""


@dataclass(frozen=True)
class RefinementSettings:
    """Of every refinement worker."""

    source: RunSource
    generation: Generation
    samples: tuple[SampleUnit, ...]
    prompts: tuple[PromptUnit, ...]


@dataclass(frozen=True)
class RefinementUnit:
    """One transformer whose blocks are all calibrated by one method."""

    name: str
    method: MethodPlan
    artifacts: tuple[str, ...]
    """Logical names of the block artifacts."""
    sparse_attention: SparseAttentionSpec | None = None
    role: str = TRANSFORMER
    """Component of the pipeline."""
    steps: tuple[int, ...] | None = None
    """Steps that it serves; None for all."""


@dataclass(frozen=True)
class AssemblySettings:
    """Of the assembly."""

    source: RunSource
    max_shard_bytes: int
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, written into the checkpoint's config."""


@dataclass(frozen=True)
class AssembledTransformer:
    """The result of the calibration for one transformer, its artifacts by logical names."""

    artifacts: tuple[str, ...]
    """Logical names of the block artifacts."""
    sparse_attention: SparseAttentionSpec | None = None
    velocity_correction: VelocityCorrection | None = None


@dataclass(frozen=True)
class AssemblyUnit:
    """One method's checkpoint."""

    name: str
    method: MethodPlan
    bits_label: str
    transformers: Mapping[str, AssembledTransformer]
    """By component of the pipeline."""
    checkpoint: str


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
    """The unit that assembled it, `assembly/<method>`; None is the full-precision model."""
    setting: str | None = None
    """Name of the setting of the checkpoint; None for the checkpoint as it is."""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """What that changes: arguments of `SparseAttention.configure`."""
    noise_floor: bool = False
    """Compare the full-precision model in bfloat16 with itself under another attention backend, and store no video."""
    reference: str | None = None
    """Unit of the full-precision video of the same noise, `evaluation/<unit>`; None where there is nothing to compare."""
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
    """Units that generated them, `evaluation/<unit>`."""
    checkpoint: str | None
    """As of `EvaluationUnit`; None is the noise floor: the full-precision model in bfloat16 under another attention
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
    """Units that generated them, `evaluation/<unit>`."""
    steps: tuple[int, ...]
    """Perturbed ones; the weights of those between are interpolated."""
    rows: int
    """Roll-outs at once."""
