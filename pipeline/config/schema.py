"""A run's configuration: one YAML file, checked as a whole before any work. Imports no torch.

`RunConfig` in full, with all defaults, is what `config.json` of a run holds. `run`, `cache`, `workers` and `cluster` say where
and with how much a run is done; everything else says what comes out, and belongs to the fingerprints of the units that it
decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from pipeline.config.knobs import KnobsConfig, SettingName
from pipeline.config.method import Method
from pipeline.config.section import Section
from reelquant.settings.generation import Generation, LayerBits, Numerics, check_activation_bits
from reelquant.settings.recipe import PRESETS, Recipe
from storage.location import Location, StoreUrl, expand_home, parse_location
from workers.candidates import FEATURES, RANKED, DiffusionFeature, Feature, Strategy
from workers.sharding import Sharding

WeightBits = Annotated[int, Field(ge=2, le=8)]


def _location(value: Any) -> Location:
    if not isinstance(value, str | Path | StoreUrl):
        raise ValueError("must be a path or s3://bucket/prefix")
    return parse_location(value)


def _named(value: Any) -> Any:
    if value == "":
        raise ValueError("is empty: give a path")
    return value


LocalPath = Annotated[Path, BeforeValidator(_named), AfterValidator(expand_home)]
"""A path in which `~` is the home directory."""
RunLocation = Annotated[Path | StoreUrl, PlainValidator(_location), PlainSerializer(str)]


METRIC_FRAC = 0.15
"""Share of the evaluation's forward passes that teacher-forced passes take by default."""


@dataclass(frozen=True, kw_only=True)
class BitsException(LayerBits):
    """Bits of the layers whose full name matches a pattern; the last matching exception counts."""

    pattern: str
    """Shell pattern, e.g. `transformer_blocks.0.*`. One that matches no layer is an error."""


LEAST_WEIGHT_BITS = {"modulation": 4, "refiner": 6, "embedder": 8}
"""Default weight bits of the layers that read no video tokens, where `bits.weight` is not more."""


class BitsConfig(Section):
    """Bits of all layers."""

    weight: WeightBits = 4
    """Of the linears inside the blocks."""
    activation: int = 8
    """Of the linears inside the blocks that read tokens. Fewer than 8 run in INT8 containers, and save no time or memory."""
    modulation: LayerBits = Field(default={}, validate_default=True)
    """AdaLN layers, by default `weight` bits, 4 at least. One row a forward: quantized activations would save nothing."""
    refiner: LayerBits = Field(default={}, validate_default=True)
    """Text refiner blocks, rounded to nearest; by default `weight` bits, 6 at least."""
    embedder: LayerBits = Field(default={}, validate_default=True)
    """Linears of time, guidance and text embedders and of the last AdaLN, rounded to nearest; by default 8 bits."""
    exceptions: tuple[BitsException, ...] = ()
    """Applied in order after the above."""

    @field_validator("modulation", "refiner", "embedder", mode="before")
    @classmethod
    def _follow_weight(cls, value: Any, info: ValidationInfo) -> Any:
        """Fills in weight bits that are not given."""
        if not isinstance(value, dict) or "weight" in value:
            return value
        least = LEAST_WEIGHT_BITS[str(info.field_name)]
        return {**value, "weight": max(least, info.data.get("weight", least))}

    @model_validator(mode="after")
    def _check(self) -> BitsConfig:
        check_activation_bits(self.activation)
        return self


class PromptsConfig(Section):
    """UTF-8 files with one prompt a line; empty lines are skipped. In files whose name ends in `.jsonl` a line is JSON,
    `{"prompt": "...", "image": "path/from/the/file.png", "negative_prompt": "..."}`: an image for models that make a video from
    one, a text for guidance's unconditional pass, both optional."""

    calibration: LocalPath
    """Prompts whose trajectories are generated."""
    num_calibration: int = Field(default=10, ge=1)
    """How many of them, from the top (S²Q-VDiT: 10)."""
    held_out: LocalPath
    """Prompts of the evaluation; none may be a calibration prompt."""
    num_held_out: int = Field(default=16, ge=1)
    """How many of them, from the top."""


class SelectionConfig(Section):
    """Which (prompt, step) pairs calibrate the model."""

    ADDED = frozenset({"diffusion_feature"})

    strategy: Strategy = "uniform"
    """`uniform`: one sample in each of `num_samples` equal bins of the schedule, all prompts equally often. `salience`: the
    highest product scores (S²Q-VDiT §3.2); `stratified`: the highest at every step of an even schedule; both read the scores,
    all others ignore them."""
    quantization_feature: Feature = "latent"
    """Which `C_quant` the scores take."""
    diffusion_feature: DiffusionFeature = "latent"
    """Whose relative change `C_diff` is, for the strategies that read scores. `latent`: from a step's input to its result, as
    the paper's text has it; by the schedule alone that is largest at the last steps. `output`: of the network's output since
    the step before; `denoised`: of its prediction of the video, largest at steps 1 to 5 on the small model. The first
    step's change is then 0. Both follow from the stored latents, with Euler's sampler of flow matching, in float32."""
    recorded_features: tuple[Feature, ...] = ()
    """More kinds of `C_quant` that the trajectories record. `latent`, which costs nothing, is always there, and so is the
    one that the strategy reads. A study over strategies or features sets them, so that all share their trajectories."""
    num_samples: int = Field(default=40, ge=1)
    """Samples kept (S²Q-VDiT: 40)."""
    weight_error_tokens: int = Field(default=256, ge=1)
    """Tokens per layer from which `weight_error` is estimated."""
    weight_error_bits: WeightBits | None = None
    """At which `weight_error` rounds; null: `bits.weight`. A study over bits sets it, so that all share their trajectories."""

    @property
    def used_feature(self) -> Feature:
        """The feature of the scores that are stored and shown, beside the diffusion salience."""
        return self.quantization_feature if self.strategy in RANKED else "latent"

    @property
    def used_diffusion_feature(self) -> DiffusionFeature:
        """The feature of the diffusion salience that is stored with the choice and shown."""
        return self.diffusion_feature if self.strategy in RANKED else "latent"

    @property
    def features(self) -> tuple[Feature, ...]:
        """All features that the trajectories record."""
        wanted = {"latent", self.used_feature, *self.recorded_features}
        return tuple(feature for feature in FEATURES if feature in wanted)


class DistillationConfig(Section):
    """How the block list is cut, and what happens to a block that diverges."""

    segment_length: int | Literal["all"] = 8
    """Consecutive blocks per worker, at most: 1 is fully parallel, `all` sequential; segments differ by one block at most. A
    sample's activations are stored once a segment: 40 samples of HunyuanVideo at 720p take 106 GiB with 8, which suits 8 GPUs,
    and 199 GiB with 4."""
    on_failure: Literal["error", "gptq"] = "error"
    """`gptq` rounds a block whose loss becomes NaN without learning, and reports it."""

    @model_validator(mode="after")
    def _check(self) -> DistillationConfig:
        if self.segment_length != "all" and self.segment_length < 1:
            raise ValueError(f"distillation.segment_length is {self.segment_length}; 1 or more, or all")
        return self


class AssemblyConfig(Section):
    """The checkpoint."""

    max_shard_bytes: int = Field(default=5 * 10**9, ge=1024)
    """Largest safetensors file of `transformer/`; assembly has one of them in memory."""


class EvaluationConfig(Section):
    """Comparison on held-out prompts, same seeds."""

    ADDED = frozenset(
        {
            "settings",
            "seed",
            "videos",
            "velocity_prompts",
            "prompts_per_pass",
            "weight_steps",
            "weight_prompts",
            "decision_steps",
            "fork_db",
        }
    )

    recognizer: LocalPath | None = None
    """Folder of the digit recognizer; only models that draw digits have a recognition rate."""
    films: bool = True
    """Write an `.mp4` of every video; the metrics do not need it."""
    film_fps: Annotated[int, Field(ge=1, le=240)] | None = None
    """Frames a second of the `.mp4`; null: the family's, such as 24 of HunyuanVideo, 16 of Wan, 8 of CogVideoX."""
    noise_floor: bool = False
    """Also compare the full-precision model in bfloat16 with itself under another attention backend: two right answers lie
    that far apart, and no method's distance below it means anything."""
    settings: Mapping[SettingName, KnobsConfig] = Field(default={})
    """More settings of the checkpoint of `method`, by name, with each of which it is evaluated beside the checkpoint as it is:
    `{thin: {density: 0.15, precision: int8_fp8}}`. Its weights and head kinds stay as they were calibrated."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Of the held-out prompts' noises; null: the run's `seed`. A study gives all its runs the same, so that every calibration
    seed meets the same noises."""
    videos: int | None = Field(default=None, ge=1)
    """Held-out prompts, from the top, of which all models but the full-precision one generate videos; null: all. Forks and PSNR
    need many, the velocity none."""
    velocity_prompts: int | None = Field(default=None, ge=0)
    """Held-out prompts, from the top, on whose full-precision trajectories every method's velocity is measured (teacher
    forcing); 0: none. null: `floor(0.15 num_held_out)`, 1 at least: with few methods and 7 prompts or more that, with the
    weights of the steps, takes 15 % of the evaluation. Of every prompt the latents of all steps are then stored too."""
    prompts_per_pass: int = Field(default=1, ge=1)
    """Prompts in one teacher-forced call of the pipeline. A small model leaves a GPU idle with 1; memory grows with it."""
    weight_steps: int | Literal["all"] | None = None
    """Steps whose effect on the final latents is measured, evenly spaced, 2 or more; the weights of the others are
    interpolated. Each takes half a generation. null: as many as the 15 % of `velocity_prompts` leave."""
    weight_prompts: int = Field(default=1, ge=1)
    """Trajectories over which these effects are averaged."""
    decision_steps: int | None = Field(default=None, ge=1)
    """Steps of the decision phase, after which the early-commit error is taken; null: up to the last step in which the denoised
    prediction of the full-precision model still moves by 5 %."""
    fork_db: float | None = None
    """A video of lower PSNR is a fork; null: the valley of the PSNRs' histogram, if there is one."""

    @field_validator("weight_steps")
    @classmethod
    def _two_or_more(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 2:
            raise ValueError(f"is {value}; give 2 or more, `all`, or null")
        return value


@pydantic_dataclass(frozen=True)
class WorkersConfig(Sharding):
    """How much runs at once, and on how many GPUs the full-precision model lies. Changes no result."""

    gpus_per_replica: int = Field(default=1, ge=1)
    """Workers that share one model: its GPUs, or its processes on a CPU."""
    num_workers: int | Literal["auto"] = "auto"
    """Worker processes per stage; `auto`: one per GPU, or one per `numerics.threads` CPU cores; on a cluster as many as there
    are units and room, which an autoscaler makes up to its `max_workers`."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of one worker; 0 runs on the CPU, 1 is usual on a GPU machine."""
    max_attempts: int = Field(default=3, ge=1)
    """Tries of a unit whose worker dies or runs out of memory, before it is set aside."""
    stall_timeout_s: float = Field(default=900.0, gt=0)
    """Silence of a worker that counts as death."""
    placement_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for a cluster's first node with room for a worker: an autoscaler's node has to boot and to install."""

    @field_validator("offload_path", mode="wrap")
    @classmethod
    def _local(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Path | None:
        path = validate(_named(value))
        return None if path is None else expand_home(path)

    @model_validator(mode="after")
    def _check(self) -> WorkersConfig:
        if self.sharding == "none" and (self.gpus_per_replica > 1 or self.offload != "none"):
            raise ValueError(
                f"workers.gpus_per_replica is {self.gpus_per_replica} and workers.offload {self.offload}, but "
                "workers.sharding is none: set it to fsdp or deepspeed, or leave the others out"
            )
        if self.sharding != "none" and self.num_gpus not in (0, 1):
            raise ValueError(
                f"workers.num_gpus is {self.num_gpus:g} with workers.sharding {self.sharding}: every worker of a replica has "
                "one GPU (num_gpus: 1) or none (0); gpus_per_replica says over how many the model is sharded"
            )
        if self.offload == "nvme" and self.sharding != "deepspeed":
            raise ValueError(
                "workers.offload is nvme, which needs workers.sharding: deepspeed; fsdp offloads to cpu only"
            )
        if self.offload == "nvme" and self.offload_path is None:
            raise ValueError("workers.offload is nvme: say in workers.offload_path in which folder")
        if self.offload != "nvme" and self.offload_path is not None:
            raise ValueError(
                f"workers.offload_path is {self.offload_path}, but workers.offload is {self.offload}, not nvme"
            )
        return self

    @property
    def num_ranks(self) -> int | None:
        """Workers of a replica; None where there are no replicas."""
        return None if self.sharding == "none" else self.gpus_per_replica


class ClusterConfig(Section):
    """Where Ray is."""

    address: str | None = None
    """`auto` or `host:port` of a running cluster; null starts a local one."""


class RunConfig(Section):
    """One run."""

    run: RunLocation
    """The run directory, a path or `s3://bucket/prefix`: everything is kept there, and running again resumes there."""
    cache: RunLocation | None = None
    """Where finished units are kept: a path, or `s3://bucket/prefix`; null: `cache` in the run directory. Runs that name the
    same one share the units that they have in common."""
    model: LocalPath
    """Diffusers pipeline of the 16-bit model: a local folder, or else an id `owner/name` of the Hugging Face Hub. Of a
    repository, the files that the loaders read are fetched into the Hub's cache, on every node."""
    model_revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a model on the Hub; null: its default branch. The run resolves it to a commit once."""
    model_commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    """The commit that `model_revision` was at when the run began. The run fills it in and keeps it."""
    model_variant: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_]+$")
    """Weight files of the model that are taken, such as `fp16` for `diffusion_pytorch_model.fp16.safetensors`, where there are
    such; the checkpoint's have plain names. null: the plain files."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Every unit's seed comes from this, the stage and the unit."""
    generation: Generation = Generation()
    prompts: PromptsConfig
    selection: SelectionConfig = SelectionConfig()
    method: Method = PRESETS["reelquant"]
    compare: tuple[Method, ...] = ()
    """More methods, calibrated on the same samples and evaluated on the same prompts beside `method`."""
    bits: BitsConfig = BitsConfig()
    distillation: DistillationConfig = DistillationConfig()
    assembly: AssemblyConfig = AssemblyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    numerics: Numerics = Numerics()
    workers: WorkersConfig = WorkersConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"method and compare have the names {names}: each must be there once (set `name`)")
        if problems := self._evaluation_problems():
            raise ValueError("; ".join(problems))
        return self

    def _evaluation_problems(self) -> list[str]:
        """Numbers of the evaluation that are above what there is."""
        evaluation, steps = self.evaluation, self.generation.num_inference_steps
        held_out, measured = self.prompts.num_held_out, self.num_velocity_prompts
        limits: list[tuple[str, int | None, int, str]] = [
            ("velocity_prompts", evaluation.velocity_prompts, held_out, "prompts.num_held_out"),
            ("videos", evaluation.videos, held_out, "prompts.num_held_out"),
            (
                "weight_prompts",
                evaluation.weight_prompts if measured else None,
                measured,
                "evaluation.velocity_prompts",
            ),
            ("decision_steps", evaluation.decision_steps, steps, "generation.num_inference_steps"),
        ]
        if isinstance(evaluation.weight_steps, int):
            limits.append(("weight_steps", evaluation.weight_steps, steps, "generation.num_inference_steps"))
        return [
            f"evaluation.{name} is {value}, above {of}, which is {limit}: give {limit} or fewer, or raise {of}"
            for name, value, limit, of in limits
            if value is not None and value > limit
        ]

    @property
    def hub_model(self) -> str | None:
        """A model of the Hub with its commit, human-readable; None for a folder."""
        if self.model_commit is None:
            return None
        revision = "" if self.model_revision in (None, self.model_commit) else f" ({self.model_revision})"
        return f"{self.model} at commit {self.model_commit}{revision}"

    @property
    def evaluation_seed(self) -> int:
        """Of the held-out prompts' noises."""
        return self.seed if self.evaluation.seed is None else self.evaluation.seed

    @property
    def num_velocity_prompts(self) -> int:
        """Held-out prompts with teacher-forced passes."""
        given, held_out = self.evaluation.velocity_prompts, self.prompts.num_held_out
        return max(1, int(METRIC_FRAC * held_out)) if given is None else given

    @property
    def num_weight_steps(self) -> int:
        """Steps that are perturbed for the weights of all: as configured, or as many as `METRIC_FRAC` of the evaluation's
        forward passes leaves; 2 at least."""
        given, steps = self.evaluation.weight_steps, self.generation.num_inference_steps
        if given is not None:
            return steps if given == "all" else int(given)
        methods = len(self.methods)
        generations = METRIC_FRAC * self.prompts.num_held_out * (1 + methods) - self.num_velocity_prompts * methods
        # A perturbed step takes one forward pass to find its error and, on average, half a generation to roll it out.
        each = (0.5 + 1 / steps) * self.evaluation.weight_prompts
        return min(steps, max(2, int(generations / each)))

    @property
    def methods(self) -> tuple[Recipe, ...]:
        """The method, then those it is compared with."""
        return (self.method, *self.compare)

    def identity(self) -> dict[str, Any]:
        """What decides the results, as JSON values: all but where and with how many workers."""
        left_out = {"run", "cache", "workers", "cluster"}
        # Runs that were made before there were these keys go on.
        added = ("model_revision", "model_commit", "model_variant")
        left_out.update(key for key in added if getattr(self, key) is None)
        return self.model_dump(mode="json", exclude=left_out)
