"""What all stages of a run know: configuration, model, prompts, methods; resolved and checked before any work."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.config.json_lines import line_numbers
from pipeline.config.loading import ConfigError
from pipeline.config.prompts import Prompt, comparable, read_prompts, repeated_prompts
from pipeline.config.schema import RunConfig
from pipeline.hub_model import FoundModel, find_model, pinned
from pipeline.layer_bits import bits_label, group_conflicts, layer_kinds, resolve_bits
from pipeline.model_facts import ModelFacts
from pipeline.prompt_checks import input_problems
from pipeline.records import Records
from pipeline.run_units import prompt_names
from pipeline.setting_checks import setting_problems
from reelquant.calibration.without_values import META
from reelquant.checkpoint.pipeline_files import fingerprint
from reelquant.families.family import Family
from reelquant.runtime.knobs import refresh_problems
from reelquant.settings.generation import Generation
from reelquant.settings.recipe import Recipe
from reelquant.tokens import TokenLayout
from storage.atomic_files import sha256_file
from storage.cache import Cache
from storage.location import Location, expand_home
from storage.run_directory import CACHE, RunDirectory
from storage.run_prompts import KeptPrompt, KeptPrompts, Prompts
from workers.candidates import shortage
from workers.generation import branches
from workers.messages import MethodPlan, PromptUnit, RunSource
from workers.model_source import (
    ModelCheck,
    check_model,
    family_of_model,
    linear_shapes,
    roles,
    transformer_config,
    video_size,
)
from workers.recognition import DigitRecognizer
from workers.sharding import Sharding

PROMPT_FILES = ("calibration", "held_out")
"""Keys of `prompts` with a file; `num_` in front of one has the number of prompts that are taken."""


@dataclass(frozen=True)
class RunContext:
    """A checked run."""

    config: RunConfig
    model: ModelFacts
    calibration_prompts: tuple[PromptUnit, ...]
    held_out_prompts: tuple[PromptUnit, ...]
    methods: tuple[MethodPlan, ...]
    model_fingerprint: str
    recognizer_fingerprint: str | None = None
    """None where no recognizer is configured."""
    kept_prompts: Prompts = field(default_factory=dict)
    """Files and lines of the prompts."""
    model_note: str | None = None
    """At which commit a model of the Hub is, and why; None for a folder."""
    absent_prompts: tuple[str, ...] = ()
    """Keys of `prompts` whose file is not there: their prompts are stand-ins, of which only the number is right."""

    @property
    def cache_location(self) -> Location:
        """Where the units lie."""
        return (self.config.cache or self.config.run / CACHE).absolute()

    @property
    def source(self) -> RunSource:
        """For the workers."""
        config = self.config
        return RunSource(
            self.model.found.snapshot or config.model.resolve(),
            config.seed,
            config.numerics,
            config.model_variant,
        )

    @property
    def bits_label(self) -> str:
        """Bits of the blocks' layers, such as `W4A6`."""
        return bits_label(resolve_bits(self.config.bits, self.model.kinds), self.model.kinds)

    @property
    def sharding(self) -> Sharding:
        """For the workers."""
        workers = self.config.workers
        path = workers.offload_path
        return Sharding(workers.sharding, workers.offload, None if path is None else path.absolute())

    @property
    def segments(self) -> tuple[tuple[str, ...], ...]:
        """The block list, cut into as few segments as their length allows, of lengths that differ by one block at most."""
        blocks, length = self.model.blocks, self.config.distillation.segment_length
        num = 1 if length == "all" else -(-len(blocks) // length)
        bounds = [-(-len(blocks) * index // num) for index in range(num + 1)]
        return tuple(blocks[begin:end] for begin, end in pairwise(bounds))

    @property
    def branches(self) -> tuple[str, ...]:
        """Calls of the transformer in one step for one video."""
        return branches(self.model.family, self.config.generation)

    @cached_property
    def steps(self) -> dict[str, tuple[int, ...]]:
        """Steps of a generation by the transformer that serves them."""
        return self.model.steps(self.config.generation.num_inference_steps)

    @property
    def served(self) -> tuple[str, ...]:
        """Transformer that serves each step; empty where there is only one."""
        if len(self.steps) == 1:
            return ()
        return tuple(role for _, role in sorted((step, role) for role, steps in self.steps.items() for step in steps))

    def base_fingerprint(self) -> dict[str, Any]:
        """What every unit that runs the model depends on. Not on `deterministic`: what is done is right either way."""
        numerics = self.config.numerics.to_dict()
        del numerics["deterministic"]
        return {"model": self.model_fingerprint, "seed": self.config.seed, "numerics": numerics}

    def evaluation_fingerprint(self) -> dict[str, Any]:
        """What every unit of the evaluation depends on: the seed is that of its noises."""
        return {**self.base_fingerprint(), "seed": self.config.evaluation_seed}


@dataclass(frozen=True)
class Run:
    """A checked run, its directory, and what is known of its units."""

    context: RunContext
    directory: RunDirectory
    cache: Cache
    records: Records = field(default_factory=Records)


def model_facts(found: FoundModel, generation: Generation, *, variant: str | None = None) -> ModelFacts:
    """Reads the model's configuration; no weights."""
    family, config = family_of_model(found.folder), transformer_config(found.folder)
    linears = linear_shapes(config, family)
    kinds = layer_kinds(family, config, linears)
    layout = _layout(found.folder, family, generation)
    return ModelFacts(found, family, config, linears, kinds, variant, layout, roles(found.folder))


def _layout(model: Path, family: Family, generation: Generation) -> TokenLayout | None:
    """Tokens of a generation without text, None where the VAE does not say: its problems are named elsewhere."""
    config = transformer_config(model)
    with contextlib.suppress(ValueError, TypeError, KeyError), META:
        call = family.inputs(config, video_size(model, generation))
        return family.layout(config, call, 0)
    return None


def build_context(config: RunConfig, *, weights: bool = True, may_lack: Collection[str] = ()) -> RunContext:
    """Checks everything that can be checked before any work. A model of the Hub is pinned to a commit.

    Args:
        weights: read the model's weights too, compare them with the components' classes, and fingerprint them; those that the
            Hub's cache lacks are not fetched (`model.found`), and the context is none to run with.
        may_lack: keys of `prompts` whose file need not be there. Without it, the context is none to run with either.

    Raises:
        ConfigError: all problems at once.
    """
    prompts, absent, problems = _prompts(config, may_lack)
    problems += _too_few_candidates(config)
    problems += recognizer_problems(config.evaluation.recognizer)
    try:
        config, note = pinned(config)
        found = find_model(config)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    checked = check_found(found, variant=config.model_variant, weights=weights)
    problems += checked.problems
    if not checked.can_plan:
        raise ConfigError(list(dict.fromkeys(problems)))
    try:
        model = model_facts(found, config.generation, variant=config.model_variant)
        bits = resolve_bits(config.bits, model.kinds)
        problems += group_conflicts(model.family, model.config, bits)
        impossible = [problem for method in config.methods for problem in _sparse_problems(method, model, config)]
        problems += [*impossible, *_feature_problems(model, config), *_role_problems(model, config)]
        problems += input_problems(config, prompts, model)
        if not impossible:
            levels = model.noise_levels(config.generation.num_inference_steps)
            dense_frames = 0 if model.layout is None else model.layout.dense_frames
            methods = tuple(
                MethodPlan.of(recipe, bits, levels, model.blocks, dense_frames) for recipe in config.methods
            )
            problems += setting_problems(config, methods[0], model)
    except (ConfigError, ValueError) as error:
        problems += error.problems if isinstance(error, ConfigError) else [str(error)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    for key in absent:
        prompts[key] = [Prompt(str(n), n) for n in range(1, getattr(config.prompts, f"num_{key}") + 1)]
    return RunContext(
        config,
        model,
        _prompt_units(prompts["calibration"]),
        _prompt_units(prompts["held_out"]),
        methods,
        checked.fingerprint,
        recognizer_fingerprint(config.evaluation.recognizer),
        {key: _kept(getattr(config.prompts, key), own) for key, own in prompts.items()},
        note,
        tuple(absent),
    )


def check_found(found: FoundModel, *, variant: str | None, weights: bool) -> ModelCheck:
    """Checks a model as far as it is here: the weights of an outline once they are fetched."""
    complete = not (found.is_outline or found.problems)
    checked = check_model(found.folder, variant=variant, weights=weights and complete)
    if complete:
        return checked
    return replace(checked, problems=(*found.named(checked.problems), *(found.problems if weights else ())))


def recognizer_problems(folder: Path | None) -> list[str]:
    """Files that a configured recognizer lacks."""
    if folder is None:
        return []
    if not folder.is_dir():
        return [f"evaluation.recognizer: {folder} is not a folder"]
    missing = [name for name in DigitRecognizer.FILES if not (folder / name).is_file()]
    return [f"evaluation.recognizer: {folder} has no {', '.join(missing)}"] if missing else []


def recognizer_fingerprint(folder: Path | None) -> str | None:
    """Hash over the files of a recognizer, which is the same whatever its folder is called; None for none."""
    if folder is None:
        return None
    return fingerprint({name: sha256_file(folder / name) for name in DigitRecognizer.FILES})


def prompt_notes(context: RunContext) -> list[str]:
    """Prompts that stand more than once in their file: they are taken more than once."""
    notes = []
    for key, kept in context.kept_prompts.items():
        own = (
            (p.content["prompt"], frozenset(p.content.items() - {("prompt", p.content["prompt"])}), p.line)
            for p in kept.prompts
        )
        notes += [
            f"prompts.{key}: {prompt!r} stands more than once in {kept.file}, {line_numbers(lines)}, and counts as often"
            for prompt, lines in repeated_prompts(own)
        ]
    return notes


def prompt_refusals(context: RunContext, *, update: bool) -> list[str]:
    """Why the run directory, as it is now, is none for these prompts.

    Args:
        update: other ones that it was made with are no reason.
    """
    try:
        if not update:
            RunDirectory.check_prompts(context.config.run, context.kept_prompts)
    except ValueError as error:
        return [f"run: {error}"]
    return []


def _kept(file: Path, prompts: list[Prompt]) -> KeptPrompts:
    lines = [
        KeptPrompt(prompt.line, unit.to_dict(), None if prompt.image is None else prompt.image.name)
        for prompt, unit in zip(prompts, _prompt_units(prompts), strict=True)
    ]
    return KeptPrompts(str(file), tuple(lines))


def absent_prompts(context: RunContext) -> list[str]:
    """Prompt files that are not there, and what stands in for them."""
    prompts, most = context.config.prompts, context.config.generation.max_sequence_length
    return [
        f"prompts.{key}: {getattr(prompts, key)} is not there: counted are {getattr(prompts, f'num_{key}')} prompts of {most} "
        "tokens"
        for key in context.absent_prompts
    ]


def _prompts(config: RunConfig, may_lack: Collection[str]) -> tuple[dict[str, list[Prompt]], list[str], list[str]]:
    """Prompts by key of `prompts`, none of a file that cannot be used; keys whose file is not there; and what is wrong."""
    problems: list[str] = []
    absent: list[str] = []
    prompts: dict[str, list[Prompt]] = {key: [] for key in PROMPT_FILES}
    for key in PROMPT_FILES:
        path, num = getattr(config.prompts, key), getattr(config.prompts, f"num_{key}")
        if key in may_lack and not expand_home(path).exists():
            absent.append(key)
            continue
        try:
            prompts[key] = read_prompts(path, num, key)
        except ConfigError as error:
            problems += error.problems
    calibration = {(comparable(p.prompt), _image(p)) for p in prompts["calibration"]}
    shared = [p.prompt for p in prompts["held_out"] if (comparable(p.prompt), _image(p)) in calibration]
    if shared:
        problems.append(
            f"prompts.held_out: {sorted(set(shared))} are calibration prompts too; held-out prompts must be others"
        )
    return prompts, absent, problems


def _prompt_units(prompts: list[Prompt]) -> tuple[PromptUnit, ...]:
    return tuple(
        PromptUnit(name, prompt.prompt, prompt.negative_prompt, _image(prompt))
        for name, prompt in zip(prompt_names(len(prompts)), prompts, strict=True)
    )


def _image(prompt: Prompt) -> bytes | None:
    return None if prompt.image is None else prompt.image.content


def _sparse_problems(method: Recipe, model: ModelFacts, config: RunConfig) -> list[str]:
    """Settings of the generation that the model or its schedule cannot have."""
    attention, steps = method.attention, config.generation.num_inference_steps
    problems = []
    if method.tokens_per_step < 1 and model.family.rows is None:
        problems.append(
            f"tokens_per_step is {method.tokens_per_step:g}, but blocks of {model.family.name} are computed for all tokens "
            "only; set tokens_per_step: 1"
        )
    if method.drift_repair and not all(call.outputs for call in model.calls.values()):
        problems.append(
            f"drift_repair is on, but of this {model.family.name} no layers are declared that add to the stream with one gate "
            "for all tokens; set drift_repair: false"
        )
    if method.protected_steps > steps:
        problems.append(f"protected_steps is {method.protected_steps}, but a generation has {steps} steps")
    if attention.density < 1:
        _, head_dim = model.family.num_heads(model.config)
        problems += attention.residual.problems(head_dim)
        if isinstance(attention.refresh_steps, tuple):
            found = refresh_problems(attention.refresh_steps, steps)
            problems += [f"attention.{problem}; a generation has {steps} steps" for problem in found]
        if attention.dense_steps >= steps:
            problems.append(
                f"attention.dense_steps is {attention.dense_steps}: all {steps} steps would be dense; set fewer"
            )
        if attention.interval == 1 and attention.residual.order and not isinstance(attention.refresh_steps, tuple):
            problems.append(
                "attention.interval is 1: every step would be a refresh, which is dense; set 2 or more, or attention.density: 1"
            )
        if attention.dense_layers >= len(model.blocks):
            problems.append(
                f"attention.dense_layers is {attention.dense_layers}: all {len(model.blocks)} blocks would be"
            )
    return [f"method {method.name}: {problem}" for problem in problems]


def _feature_problems(model: ModelFacts, config: RunConfig) -> list[str]:
    """Why the diffusion salience cannot be that of the network's output."""
    feature = config.selection.used_diffusion_feature
    if feature == "latent":
        return []
    problems, numerics = [], config.numerics
    try:
        model.sigmas(config.generation.num_inference_steps)
    except ValueError as error:
        problems.append(f"selection.diffusion_feature is {feature}, but {error}; set it to latent")
    if numerics.dtype == "bfloat16" or (numerics.dtype == "auto" and config.workers.num_gpus > 0):
        problems.append(
            f"selection.diffusion_feature is {feature}, which is taken from differences of latents, but numerics.dtype "
            f"{numerics.dtype} (workers.num_gpus {config.workers.num_gpus:g}) rounds latents to bfloat16, too coarsely; "
            "set numerics.dtype: float32, or selection.diffusion_feature: latent"
        )
    return problems


def _role_problems(model: ModelFacts, config: RunConfig) -> list[str]:
    """Transformers that serve too few steps to be calibrated."""
    if len(model.roles) == 1:
        return []
    problems = []
    for role, steps in model.steps(config.generation.num_inference_steps).items():
        found = shortage(
            config.selection.strategy,
            num_samples=config.selection.num_samples,
            num_prompts=config.prompts.num_calibration,
            num_steps=len(steps),
        )
        problems += [] if found is None else [f"{role}, which serves {len(steps)} steps: {found}"]
    return problems


def _too_few_candidates(config: RunConfig) -> list[str]:
    problem = shortage(
        config.selection.strategy,
        num_samples=config.selection.num_samples,
        num_prompts=config.prompts.num_calibration,
        num_steps=config.generation.num_inference_steps,
    )
    return [] if problem is None else [problem]
