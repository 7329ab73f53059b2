"""How many tokens a run's videos and prompts have, and what is wrong with its resolution and text length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from pipeline.context import RunContext
from reelquant.calibration.without_values import META
from reelquant.checkpoint.pipeline_files import read_json
from reelquant.families.family import Config, Family, PromptTemplate, VideoSize
from reelquant.tokens import TokenLayout
from workers.library_messages import quieten_libraries
from workers.model_source import compression, video_size


@dataclass
class TokenCounts:
    """Shapes of one generation, and what makes them impossible."""

    size: VideoSize = field(default_factory=lambda: VideoSize(0, 0, 0, 0))
    """Of the latents, and the padded numbers of text tokens."""
    latent_shape: tuple[int, ...] = ()
    """Of one video's latents, as the pipeline has them."""
    video_shape: tuple[int, int, int, int] = (0, 0, 0, 3)
    """`(frames, height, width, 3)` of the decoded video."""
    text: dict[str, int] = field(default_factory=dict)
    """Tokens without padding of every calibration prompt; the limit where the tokenizer is not there."""
    second_text: dict[str, int] = field(default_factory=dict)
    """The same of the text for a second encoder, of prompts that have any."""
    layout: TokenLayout = field(default_factory=lambda: TokenLayout(0, 0, 0, 0))
    """Grid of the video tokens, and the padded number of text tokens."""
    problems: list[str] = field(default_factory=list)
    """Why it cannot run."""
    notes: list[str] = field(default_factory=list)
    """What is cut, or not known."""

    @property
    def calls(self) -> dict[str, VideoSize]:
        """Sizes of the transformer's call for every calibration prompt, without padding."""
        return {
            name: replace(self.size, num_text=num_text, num_second_text=self.second_text.get(name, 0))
            for name, num_text in self.text.items()
        }

    @property
    def longest(self) -> VideoSize:
        """Of the call with the most text."""
        return max(self.calls.values(), key=lambda size: size.num_all_text, default=replace(self.size, num_text=1))


def count_tokens(context: RunContext) -> TokenCounts:
    """Counts the tokens of a run; problems are collected, not raised."""
    generation, model = context.config.generation, context.model
    counts = TokenCounts()
    try:
        temporal, spatial = compression(model.folder)
    except (ValueError, TypeError) as error:
        counts.problems.append(f"model: {error}")
        return counts
    counts.size = video_size(model.folder, generation)
    first_frame = model.family.first_frame_of(model.config)
    counts.video_shape = (
        (counts.size.frames - 1 - (first_frame == "left_out")) * temporal + 1,
        counts.size.height * spatial,
        counts.size.width * spatial,
        3,
    )
    with META:
        call = model.family.inputs(model.config, counts.size)
    latents = model.family.latents(model.config, call["hidden_states"])
    if first_frame == "given":
        latents = latents.narrow(3 - model.family.channel_axis, 1, counts.size.frames - 1)
    counts.latent_shape = tuple(latents.shape[1:])
    counts.layout = model.family.layout(model.config, call, counts.size.num_text)
    counts.problems += size_problems(context)
    vae, channels = read_json(model.folder / "vae" / "config.json"), model.family.latent_channels(model.config)
    made = vae.get("latent_channels", vae.get("z_dim"))
    if made is not None and made != channels:
        counts.problems.append(
            f"model: the VAE makes {made} latent channels, the transformer reads {channels}: they are not of one pipeline"
        )
    sides = tuple(call["hidden_states"].shape[-2:])
    if call["hidden_states"].ndim == 5 and sides != (counts.size.height, counts.size.width):
        counts.problems.append(
            f"generation.height is {generation.height} and generation.width {generation.width}, but this {model.family.name} "
            f"has positions for one size only: set them to {sides[0] * spatial} and {sides[1] * spatial}"
        )
    if (only := only_frames(model.family, model.config)) not in (None, counts.size.frames):
        counts.problems.append(
            f"generation.num_frames is {generation.num_frames}, but this {model.family.name} has positions for one number of "
            f"frames only: set it to {(only - 1) * temporal + 1}"
        )
    if (fixed := call["encoder_hidden_states"].shape[1]) != counts.size.num_text:
        counts.problems.append(
            f"generation.max_sequence_length is {generation.max_sequence_length}, but this {model.family.name} reads {fixed} "
            f"text tokens, no more and no fewer: set it to {fixed}"
        )
    _count_text(context, counts)
    return counts


def size_problems(context: RunContext) -> list[str]:
    """Sizes of the video that the model's pipeline, VAE or patches cannot take."""
    generation, patch = context.config.generation, patches(context.model.family, context.model.config)
    temporal, spatial = compression(context.model.folder)
    problems = []
    for key, size in (("height", patch[1]), ("width", patch[2])):
        value, asked = getattr(generation, key), context.model.family.side_multiple
        step = math.lcm(spatial * size, asked)
        if value % step:
            down = value // step * step
            ways = f"{down} or {down + step}" if down else f"{step}"
            problems.append(
                f"generation.{key} is {value}, but VAE ({spatial}x), patches ({size}x) and pipeline ({asked}) need a multiple "
                f"of {step}: {ways}"
            )
    last, size = generation.num_frames - 1, patch[0]
    if last % temporal or (last // temporal + 1) % size:
        problems.append(
            f"generation.num_frames is {generation.num_frames}, but VAE ({temporal}x in time) and patches ({size}x) need "
            f"{temporal * size} k + {(size - 1) * temporal + 1}"
        )
    return problems


def patches(family: Family, config: Config) -> tuple[int, int, int]:
    """Latents of a token: in time, 1 where the pipeline adds what is lacking, in height and width."""
    size = VideoSize(frames=1, height=48, width=48, num_text=1)
    with META:
        calls = (family.inputs(config, replace(size, frames=num)) for num in range(1, 49))
        found, call = next((num, call) for num, call in enumerate(calls, 1) if family.grid(config, call)[0])
        hidden, (_, height, width) = call["hidden_states"], family.grid(config, call)
    sides = hidden.shape[-2:] if hidden.ndim == 5 else (48, 48)  # some models have positions for one size only
    return found, sides[0] // height, sides[1] // width


def only_frames(family: Family, config: Config) -> int | None:
    """Frames of the latents that the transformer takes, no more and no fewer; None where their number is free."""
    size = VideoSize(frames=1, height=48, width=48, num_text=1)
    with META:
        few, many = (family.inputs(config, replace(size, frames=num))["hidden_states"] for num in (1, 96))
    return int(few.shape[3 - family.channel_axis]) if few.ndim == 5 and few.shape == many.shape else None


def _count_text(context: RunContext, counts: TokenCounts) -> None:
    limit, template = context.config.generation.max_sequence_length, context.model.family.template(context.model.config)
    positions = _text_positions(context.model.folder)
    if positions is not None and template.crop + limit > positions:
        counts.problems.append(
            f"generation.max_sequence_length is {limit}: with the {template.crop} tokens of the pipeline's instruction more "
            f"than the text encoder's {positions} positions; at most {positions - template.crop}"
        )
    units = {"calibration": context.calibration_prompts, "held_out": context.held_out_prompts}
    texts = {f"prompts.{key}": [unit.prompt for unit in own] for key, own in units.items()}
    texts |= {
        f"prompts.{key}, negative": [unit.negative_prompt for unit in own if unit.negative_prompt]
        for key, own in units.items()
    }
    try:
        folder = context.model.folder / "tokenizer"
        lengths = prompt_lengths(folder, template, [text for own in texts.values() for text in own])
    except (OSError, ValueError) as error:
        counts.problems.append(f"model: its tokenizer cannot be loaded: {error}")
        lengths = None
    if lengths is None:
        counts.notes.append(f"no tokenizer in the model's folder: every prompt is counted with {limit} tokens")
        counts.text = {prompt.name: counts.size.num_text for prompt in context.calibration_prompts}
        return
    if min(lengths) <= template.crop_end:
        counts.problems.append(
            f"model: its tokenizer makes {min(lengths) + template.crop} tokens of a prompt with the pipeline's instruction, of "
            f"which {template.crop + template.crop_end} are cut off: nothing is left; the tokenizer is not the text encoder's"
        )
    left = iter(lengths)
    for where, own in texts.items():
        cut = [length for length in islice(left, len(own)) if length > limit]
        if cut:
            have = "has" if len(cut) == 1 else "have"
            counts.notes.append(
                f"{where}: {len(cut)} of {len(own)} prompts {have} more than the {limit} tokens of "
                f"generation.max_sequence_length (up to {max(cut)}); the rest is cut off"
            )
    _count_second_text(context, counts)
    counts.text = {
        prompt.name: max(1, template.num_tokens(min(limit, length))) if context.model.family.padding else limit
        for prompt, length in zip(context.calibration_prompts, lengths, strict=False)
    }


def _count_second_text(context: RunContext, counts: TokenCounts) -> None:
    second = context.model.family.second_text
    if second is None:
        return
    given = {prompt.name: second.of(prompt.prompt) for prompt in context.calibration_prompts}
    texts = {name: text for name, text in given.items() if text is not None}
    try:
        lengths = prompt_lengths(context.model.folder / "tokenizer_2", PromptTemplate(), list(texts.values()))
    except (OSError, ValueError) as error:
        counts.problems.append(f"model: its tokenizer_2 cannot be loaded: {error}")
        lengths = None
    found = [second.limit] * len(texts) if lengths is None else [min(second.limit, length) for length in lengths]
    counts.second_text = dict(zip(texts, found, strict=True))


def prompt_lengths(folder: Path, template: PromptTemplate, prompts: Sequence[str]) -> list[int] | None:
    """Tokens of every prompt as the pipeline sees them, uncut; None where the tokenizer's folder is not there.

    Raises:
        OSError, ValueError: the tokenizer cannot be loaded.
    """
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    quieten_libraries()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return [len(tokenizer(template.text.format(prompt)).input_ids) - template.crop for prompt in prompts]


def _text_positions(model: Path) -> int | None:
    path = model / "text_encoder" / "config.json"
    if not path.is_file():
        return None
    positions = read_json(path).get("max_position_embeddings")
    return int(positions) if positions is not None else None
