"""How many tokens a run's videos and prompts have, and what is wrong with its resolution and text length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from pipeline.context import RunContext
from reelquant.checkpoint.pipeline_files import read_json
from reelquant.tokens import TokenLayout, band_width
from workers.library_messages import quieten_libraries

_CROP = int(DEFAULT_PROMPT_TEMPLATE["crop_start"])
"""Tokens of the instruction in front of every prompt, which the pipeline cuts off again."""


@dataclass
class TokenCounts:
    """Shapes of one generation, and what makes them impossible."""

    latent_shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    """`(C, F, H, W)`."""
    video_shape: tuple[int, int, int, int] = (0, 0, 0, 3)
    """`(frames, height, width, 3)` of the decoded video."""
    text: dict[str, int] = field(default_factory=dict)
    """Tokens without padding of every calibration prompt; the limit where the tokenizer is not there."""
    layout: TokenLayout = field(default_factory=lambda: TokenLayout(0, 0, 0, 0))
    """Grid of the video tokens, and the padded number of text tokens."""
    problems: list[str] = field(default_factory=list)
    """Why it cannot run."""
    notes: list[str] = field(default_factory=list)
    """What is cut, or not known."""

    @property
    def longest_stream(self) -> int:
        """Video tokens and the text tokens of the longest calibration prompt: rows of an activation."""
        return self.layout.num_video + max(self.text.values(), default=0)


def count_tokens(context: RunContext) -> TokenCounts:
    """Counts the tokens of a run; problems are collected, not raised."""
    generation, model = context.config.generation, context.model
    counts = TokenCounts()
    vae = _vae_config(model.folder, counts)
    spatial, temporal = int(vae["spatial_compression_ratio"]), int(vae["temporal_compression_ratio"])
    frames = (generation.num_frames - 1) // temporal + 1
    counts.latent_shape = (
        int(model.config["in_channels"]),
        frames,
        generation.height // spatial,
        generation.width // spatial,
    )
    counts.video_shape = (
        (frames - 1) * temporal + 1,
        counts.latent_shape[2] * spatial,
        counts.latent_shape[3] * spatial,
        3,
    )
    counts.layout = model.family.token_layout(model.config, counts.latent_shape, generation.max_sequence_length)
    counts.problems += _grid_problems(context, spatial=spatial, temporal=temporal)
    channels = vae.get("latent_channels")
    if channels is not None and channels != counts.latent_shape[0]:
        counts.problems.append(
            f"model: the VAE makes {channels} latent channels, the transformer reads {counts.latent_shape[0]}: "
            "they are not of one pipeline"
        )
    _count_text(context, counts)
    return counts


def band_problems(context: RunContext, counts: TokenCounts) -> list[str]:
    """Methods, and settings of the evaluation, whose density is narrower than one token at this run's shapes."""
    layout = replace(counts.layout, num_text=max(counts.text.values(), default=0))
    methods = [(m.name, m.recipe.sparse) for m in context.methods]
    densities = {f"method {name}: attention.density": sparse.density for name, sparse in methods if sparse is not None}
    settings = context.config.evaluation.settings.items()
    densities |= {f"evaluation.settings.{name}.density": s.density for name, s in settings if s.density is not None}
    problems = []
    for place, density in densities.items():
        try:
            band_width(layout, density)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    return problems


def _vae_config(model: Path, counts: TokenCounts) -> dict[str, Any]:
    defaults = {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}
    path = model / "vae" / "config.json"
    if not path.is_file():
        counts.problems.append(f"model: {path} is missing")
        return defaults
    return {**defaults, **read_json(path)}


def _grid_problems(context: RunContext, *, spatial: int, temporal: int) -> list[str]:
    generation, config = context.config.generation, context.model.config
    problems = []
    step = spatial * int(config["patch_size"])
    for key in ("height", "width"):
        value = getattr(generation, key)
        if value % step:
            down = value // step * step
            ways = f"{down} or {down + step}" if down else f"{step}"
            problems.append(
                f"generation.{key} is {value}, but VAE ({spatial}x) and patches ({config['patch_size']}x) need a "
                f"multiple of {step}: {ways}"
            )
    frame_step = temporal * int(config["patch_size_t"])
    if (generation.num_frames - 1) % temporal or ((generation.num_frames - 1) // temporal + 1) % config["patch_size_t"]:
        first = (int(config["patch_size_t"]) - 1) * temporal + 1
        problems.append(
            f"generation.num_frames is {generation.num_frames}, but VAE ({temporal}x in time) and patches "
            f"({config['patch_size_t']}x) need {frame_step} k + {first}"
        )
    return problems


def _count_text(context: RunContext, counts: TokenCounts) -> None:
    limit = context.config.generation.max_sequence_length
    positions = _text_positions(context.model.folder)
    if positions is not None and _CROP + limit > positions:
        counts.problems.append(
            f"generation.max_sequence_length is {limit}: with the {_CROP} tokens of the pipeline's instruction more than "
            f"the text encoder's {positions} positions; at most {positions - _CROP}"
        )
    prompts = [*context.calibration_prompts, *context.held_out_prompts]
    try:
        lengths = prompt_lengths(context.model.folder, [prompt.prompt for prompt in prompts])
    except (OSError, ValueError) as error:
        counts.problems.append(f"model: its tokenizer cannot be loaded: {error}")
        lengths = None
    if lengths is None:
        counts.notes.append(f"no tokenizer in the model's folder: every prompt is counted with {limit} tokens")
        counts.text = {prompt.name: limit for prompt in context.calibration_prompts}
        return
    if min(lengths) < 1:
        counts.problems.append(
            f"model: its tokenizer makes {min(lengths) + _CROP} tokens of a prompt with the pipeline's instruction, of "
            f"which {_CROP} are cut off: nothing is left; the tokenizer is not the text encoder's"
        )
    for key, start in (("calibration", 0), ("held_out", len(context.calibration_prompts))):
        own = getattr(context, f"{key}_prompts")
        cut = [length for length in lengths[start : start + len(own)] if length > limit]
        if cut:
            have = "has" if len(cut) == 1 else "have"
            counts.notes.append(
                f"prompts.{key}: {len(cut)} of {len(own)} prompts {have} more than the {limit} tokens of "
                f"generation.max_sequence_length (up to {max(cut)}); the rest is cut off"
            )
    counts.text = {
        prompt.name: max(1, min(limit, length))
        for prompt, length in zip(context.calibration_prompts, lengths, strict=False)
    }


def prompt_lengths(model: Path, prompts: Sequence[str]) -> list[int] | None:
    """Tokens of every prompt as the pipeline sees them, uncut; None where the model's folder has no tokenizer.

    Raises:
        OSError, ValueError: the tokenizer cannot be loaded.
    """
    folder = model / "tokenizer"
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    quieten_libraries()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    template = str(DEFAULT_PROMPT_TEMPLATE["template"])
    return [len(tokenizer(template.format(prompt)).input_ids) - _CROP for prompt in prompts]


def _text_positions(model: Path) -> int | None:
    path = model / "text_encoder" / "config.json"
    if not path.is_file():
        return None
    positions = read_json(path).get("max_position_embeddings")
    return int(positions) if positions is not None else None
