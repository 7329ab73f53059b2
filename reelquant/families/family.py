"""What a model family declares: the one thing that has to be written for a new one, a file with a `FAMILY` in it.

How a block is called is not described: it is recorded (`reelquant.calibration.block_call`). A family says what no recording
shows: which modules are the blocks, which attention is the self-attention, where text stands among its keys, what the linears
outside the blocks are, and how diffusers' pipeline drives a generation.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reelquant.tokens import Grid, TokenLayout

Config = Mapping[str, Any]
"""A transformer's `config.json`."""
Arguments = Mapping[str, Any]
"""Arguments of a transformer's or a block's call by name."""
StreamName = Literal["video", "text", "joint", "conditioning", "apart"]
Text = Literal["before", "after", "apart"]
LayerKind = Literal["refiner", "embedder"]
Guidance = Literal["one_pass", "two_passes", "batched"]
ImageUse = Literal["none", "optional", "needed"]
FirstFrame = Literal["made", "given", "left_out"]
AttentionCore = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(batch element, q, k, v [H, L, D]) -> [H, L, D]`, video tokens first, then its text tokens.

One with a true `takes_many` also takes `[n H, L, D]`, the heads of n elements with as many tokens; it is told the first.
"""

FAMILIES = {
    "CogVideoXTransformer3DModel": "cogvideox",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video_15",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "LTXVideoTransformer3DModel": "ltx_video",
    "MochiTransformer3DModel": "mochi",
    "WanTransformer3DModel": "wan",
}
"""Module in this package by the architecture that it declares."""


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of one block that read the same tensor: they share one channel scale and one rotation."""

    stream: StreamName
    """Which tokens they read: the video's, the text's as part of the stream, both, the one row of the timestep embedding, or
    text that stays the same from block to block."""
    layers: tuple[str, ...]
    """Names inside the block, in the order in which the block calls them. The first one is the leader."""
    num_calls: int = 1
    """How often a block calls the leader, on different rows."""

    @property
    def name(self) -> str:
        """The leader's."""
        return self.layers[0]


Levels = tuple[tuple[InputGroup, ...], ...]
"""Groups of a block: the inputs of a level depend only on the layers of the levels before it."""


@dataclass(frozen=True)
class OutputLayer:
    """A linear layer of a block whose output is added to the stream, times a gate that is the same for all tokens."""

    layer: str
    """Name inside the block."""
    stream: StreamName
    """Which tokens it is added to: the video's, the text's, or both."""
    gate: tuple[str, int]
    """Module inside the block whose output, a tuple, has the gate `[1, d]` at this place."""


@dataclass(frozen=True)
class VideoSize:
    """Sizes of a transformer's call, without values."""

    frames: int
    """Of the latents."""
    height: int
    """Of the latents."""
    width: int
    """Of the latents."""
    num_text: int
    """Text tokens."""
    batch: int = 1
    """Videos at once."""
    num_image: int | None = None
    """Tokens that the pipeline's image encoder makes of an image; 0 without one, None where no image is given."""
    token_timesteps: bool = False
    """Whether every video token has a timestep of its own."""
    num_second_text: int = 0
    """Tokens of a second text (`SecondText`)."""

    @property
    def num_all_text(self) -> int:
        """Tokens of both texts."""
        return self.num_text + self.num_second_text


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a prompt, from which the pipeline makes tokens."""

    text: str = "{}"
    crop: int = 0
    """Tokens that are cut off again at the beginning."""
    crop_end: int = 0
    """Tokens that are cut off behind the prompt."""
    num_image: int = 0
    """Tokens of an image, which the text encoder reads too: they come before the prompt's."""

    def num_tokens(self, limit: int) -> int:
        """Text tokens that the transformer is given, padding included, where the pipeline's limit is `limit`."""
        return self.num_image + limit - self.crop_end


@dataclass(frozen=True)
class SecondText:
    """Text that the pipeline takes from a prompt for a second encoder, and its component `tokenizer_2`."""

    of: Callable[[str], str | None]
    """What it takes from a prompt; None where there is nothing."""
    limit: int
    """Tokens to which it is cut and padded."""


def no_template(_config: Config) -> PromptTemplate:
    """Prompts as they are."""
    return PromptTemplate()


@dataclass(frozen=True)
class FusedBlock:
    """A family's block as a program of fused operations."""

    obstacle: Callable[[nn.Module], str | None]
    """Why a block cannot run fused; None where it can."""
    forward: Callable[..., tuple[Tensor, Tensor]]
    """`(block, video, text, temb, text lengths, rotary tables) -> both streams`."""


@dataclass(frozen=True)
class Family:
    """A model family; functions are module-level ones, so that a family can be copied and pickled."""

    name: str
    """For sentences."""
    architecture: str
    """Class of diffusers."""
    blocks: Mapping[str, str]
    """Module lists of the blocks in the order in which they run, with the keys of the configuration that have their lengths."""
    self_attention: str
    """Name inside a block."""
    text: Text
    """Where the text's tokens stand among the keys of the self-attention; `apart`: not among them."""
    grid: Callable[[Config, Arguments], Grid]
    """Grid of the video tokens from the arguments of a transformer's call."""
    inputs: Callable[[Config, VideoSize], dict[str, Any]]
    """Arguments of the transformer's call without values, for planning: their names and shapes are those of the pipeline's."""
    noise_levels: Callable[[Any, int, int | None], list[float]]
    """`(scheduler, steps, video tokens)`: noise levels of a generation, as the pipeline asks its scheduler for them; without a
    number of tokens those of the longest video for which the schedule changes. Raises ValueError for other schedulers."""
    noise_level: Callable[[float], float]
    """Noise level in [0, 1] of a timestep that the pipeline hands to the transformer."""
    rounds_timesteps: bool = False
    """Whether the pipeline hands the transformer its timesteps in the dtype of the latents."""
    outside: Mapping[str, LayerKind] = field(default_factory=dict)
    """Kinds of linears outside the blocks by patterns of their names, the first that fits; others stay in 16 bits."""
    guidance: Guidance = "one_pass"
    """Calls of a step: one; two, of which the pipeline calls the one `uncond`; or one of a batch, whose first half is that."""
    boundary: str | None = None
    """Key of the pipeline's `model_index.json` with the noise level down to which `transformer` serves and below which
    `transformer_2` does, in pipelines with both; a pipeline with a second transformer is refused where there is none."""
    image: Callable[[Config, Config], ImageUse] | None = None
    """`(config, model_index.json)`: whether the transformer makes a video from an image beside the prompt; None: it does not.
    The image goes to the pipeline's argument `image`; the pipeline's class says whether it is to be given."""
    image_frame: Callable[[Config, Arguments], bool] | None = None
    """Whether the first frame of a call's latents is an image's, so that sparse attention keeps it whole (Sparse VideoGen)."""
    first_frame: Callable[[Config], FirstFrame] | None = None
    """What the pipeline does with the first frame of the latents: like the others it is `made` (None: always); it is `given`,
    an image's, and the scheduler has those behind it alone; or it is made and then `left_out` of the video."""
    token_timesteps: str | None = None
    """Key of the pipeline's `model_index.json` that is true where every video token has a timestep of its own. A step's noise
    level is then that of the largest."""
    token_rows: tuple[str, ...] = ()
    """Arguments of a block `[B, video tokens, ...]` that then are equal for tokens of one timestep."""
    frames_per_second: int = 24
    """At which films of the model's videos play in their own time."""
    side_multiple: int = 1
    """The pipeline takes heights and widths that this divides."""
    channel_axis: int = 1
    """Of the channels in a transformer's output."""
    padding: tuple[tuple[str, str], ...] = ()
    """Arguments with a text's states and the mask of its padding, where dropping the padding changes no real token. Of several
    texts the blocks see the real tokens of all first."""
    absent: tuple[str, ...] = ()
    """Arguments with states of tokens that are not there where all are zero; they are dropped with the padding."""
    needs_text: bool = True
    """Whether a call without any tokens of the first text, padding left out, is impossible."""
    padding_masks: tuple[str, ...] = ()
    """Arguments of a block that mask the padding, and are left out where it is dropped."""
    joined: tuple[tuple[str, ...], ...] = ()
    """Linears of a block that read equal tensors, if not the same one, and are to be one group."""
    outputs: Mapping[str, tuple[tuple[OutputLayer, ...], ...]] = field(default_factory=dict)
    """By module list the layers that are added to the stream, level by level, for the drift repair: what they add up to is a
    block's output less its input. Those of one level do not depend on each other."""
    gates_by_token: Callable[[Config], bool] | None = None
    """Whether the blocks have several gates in place of each, so that `outputs` does not hold."""
    template: Callable[[Config], PromptTemplate] = no_template
    second_text: SecondText | None = None
    call_defaults: Callable[[Config, int], Mapping[str, int]] | None = None
    """`(config, pixels on a side of one of the latents)`: height, width, frames and text tokens by the names of `Generation`,
    as the pipeline takes them where its call names none and its signature has no number; None: its signature has them all."""
    refusal: Callable[[Config], str | None] | None = None
    """Why a configuration of the architecture is not supported."""
    streams: Mapping[int, str] = field(default_factory=dict)
    """Arguments of the next block by places in a block's output, where diffusers' own registry does not say."""
    processor: Callable[[AttentionCore | None], Any] | None = None
    """Attention processor with a core, diffusers' own for None; without it a core takes the place of torch's attention."""
    rows: Callable[[nn.Module, Arguments, Tensor], Tensor] | None = None
    """`(block, arguments, rows)`: the output of a block at some of its tokens, video and text joined, `[1, R, d]`."""
    fused: FusedBlock | None = None

    def block_names(self, config: Config) -> tuple[str, ...]:
        """Names of the blocks in the order in which the model runs them."""
        return tuple(f"{name}.{i}" for name, key in self.blocks.items() for i in range(config[key]))

    def num_heads(self, config: Config) -> tuple[int, int]:
        """Number and size of the attention heads."""
        return config["num_attention_heads"], config["attention_head_dim"]

    def latent_channels(self, config: Config) -> int:
        """Channels of the latents: those of the transformer's output. Its input may have more behind them, of an image."""
        return int(config.get("out_channels") or config["in_channels"])

    def latents(self, config: Config, hidden_states: Tensor) -> Tensor:
        """The latents in the transformer's input `hidden_states`, without what an image adds to their channels."""
        if (channels := self.latent_channels(config)) == config["in_channels"]:
            return hidden_states
        return hidden_states.narrow(self.channel_axis, 0, channels)

    def layout(self, config: Config, call: Arguments, num_text: int) -> TokenLayout:
        """Tokens of the self-attention in a call of the transformer."""
        has_image = self.image_frame is not None and self.image_frame(config, call)
        return TokenLayout(*self.grid(config, call), num_text, dense_frames=int(has_image))

    def first_frame_of(self, config: Config) -> FirstFrame:
        """What the pipeline does with the first frame of the latents."""
        return "made" if self.first_frame is None else self.first_frame(config)

    def output_layers(self, config: Config, block: str) -> tuple[tuple[OutputLayer, ...], ...]:
        """Layers of `block` that are added to the stream, level by level; empty where the family names none."""
        if self.gates_by_token is not None and self.gates_by_token(config):
            return ()
        return self.outputs.get(block.rpartition(".")[0], ())

    def auxiliary_kind(self, layer: str) -> LayerKind | None:
        """Kind of a linear outside the blocks, None for one that stays in 16 bits and for those inside."""
        if layer.startswith(tuple(f"{name}." for name in self.blocks)):
            return None
        return next((kind for pattern, kind in self.outside.items() if fnmatch.fnmatchcase(layer, pattern)), None)

    def check_block(self, config: Config, block: str) -> None:
        """Whether a model is supported and has a block of that name.

        Raises:
            ValueError: why it is not; or which blocks there are.
        """
        if self.refusal is not None and (problem := self.refusal(config)) is not None:
            raise ValueError(problem)
        if block not in self.block_names(config):
            there = " and ".join(f"{name}.0-{config[key] - 1}" for name, key in self.blocks.items())
            raise ValueError(f"no block {block!r}: this {self.name} has {there}")


@lru_cache(maxsize=16)
def family_of_architecture(architecture: object) -> Family:
    """The family of a transformer class of diffusers by its name.

    Raises:
        ValueError: no family knows it.
    """
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported are {sorted(FAMILIES)}")
    family: Family = import_module(f"reelquant.families.{FAMILIES[architecture]}").FAMILY
    return family


def empty_transformer(config: Config, architecture: str) -> Any:
    """The transformer of a `config.json` on the meta device: no weights, no memory."""
    import diffusers

    model_class = getattr(diffusers, architecture)
    with torch.device("meta"):
        return model_class.from_config({key: value for key, value in config.items() if not key.startswith("_")})
