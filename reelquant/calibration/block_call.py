"""Recorded calls: how a block is called is seen once, in the model at work, and replayed; no code of any family.

    leaf      changes                      is kept
    stream    from block to block          for every recorded block
    other     with sample or kind of block once a sample: tensors that are one in the model are one here
              (temb, text states, rotary tables, grids, masks)

A call is a tree of keyword arguments. Which of them the outputs of a block become for the next one, diffusers says
(`diffusers_internals.block_streams`). Calls of blocks of one kind, those of one module list, differ in their streams alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass, tree_map_only

from reelquant.diffusers_internals import block_streams
from reelquant.families.attention_core import attention_core, set_attention_core, watch_attention
from reelquant.families.family import Arguments, AttentionCore, Family, Levels, OutputLayer
from reelquant.tokens import TokenLayout

Streams = dict[str, Tensor]
"""`[1, N, d]` by argument: the video's tokens, then the text's where they change from block to block."""


@dataclass(frozen=True)
class RepeatedRows:
    """A tensor `[1, L, ...]` of which only some rows differ."""

    rows: Tensor
    """`[1, R, ...]`"""
    index: Tensor
    """int64 `[L]`"""

    @classmethod
    def by_timestep(cls, value: Tensor, timestep: Tensor) -> RepeatedRows:
        """Of a tensor whose rows are equal where the timesteps `[1, L]` are. Without values two timesteps are counted."""
        if timestep.is_meta:
            return cls(value[:, :2].clone(), torch.empty(timestep.shape[1], dtype=torch.int64, device=timestep.device))
        found, index = timestep[0].unique(return_inverse=True)
        first = torch.stack([(index == row).nonzero()[0, 0] for row in range(len(found))])
        return cls(value.index_select(1, first.to(value.device)), index.to(value.device))

    def expanded(self) -> Tensor:
        """The whole tensor."""
        if self.rows.shape[1] == 1:
            return self.rows.expand(-1, len(self.index), *self.rows.shape[2:])
        return self.rows.index_select(1, self.index)


register_dataclass(RepeatedRows, field_names=["rows", "index"])


@dataclass(frozen=True)
class Constants:
    """What a sample's blocks read besides their streams."""

    calls: Mapping[str, Arguments]
    """By module list of the blocks; `RepeatedRows` in place of tensors that are mostly repetition."""
    layout: TokenLayout
    """Of the self-attention's tokens."""
    attention_residual: Tensor | None = None
    """`[H, L, D]`: what a calibration core adds to its sparse attention."""

    def arguments(self, block: str) -> dict[str, Any]:
        """Those of the block of that name, as it takes them."""
        call = self.calls[block_list(block)].items()
        return {name: value.expanded() if isinstance(value, RepeatedRows) else value for name, value in call}

    def to(self, device: torch.device | str) -> Constants:
        """The same on `device`."""
        calls = tree_map_only(Tensor, lambda leaf: leaf.to(device), dict(self.calls))
        residual = None if self.attention_residual is None else self.attention_residual.to(device)
        return replace(self, calls=calls, attention_residual=residual)


def block_list(name: str) -> str:
    """Module list of a block: its kind."""
    return name.rpartition(".")[0]


def arguments(module: nn.Module, args: Sequence[Any], kwargs: Arguments) -> dict[str, Any]:
    """A call of `module` as keyword arguments."""
    bound = dict(_signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments)
    bound.pop("self", None)
    bound.pop("args", None)
    return {**bound, **bound.pop("kwargs", {})}


@lru_cache(maxsize=64)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def stream_names(family: Family, block: nn.Module) -> Mapping[int, str]:
    """Arguments that the outputs of `block` become for the next one, by place in the output, the video's first."""
    found = family.streams or block_streams(type(block))
    return dict(sorted(found.items(), key=lambda item: item[1] != "hidden_states"))


def streams_of(family: Family, block: nn.Module, call: Arguments) -> Streams:
    """The streams among the arguments of a block's call."""
    return {name: call[name] for name in stream_names(family, block).values()}


def constants_of(family: Family, block: nn.Module, call: Arguments) -> dict[str, Any]:
    """The other arguments, without masks of padding that is dropped."""
    left_out = {*stream_names(family, block).values(), *family.padding_masks}
    return {name: value for name, value in call.items() if name not in left_out}


@dataclass(frozen=True)
class BlockCall:
    """How one block is called, and what its linears read."""

    family: Family
    name: str
    """Of the block."""
    levels: Levels
    """Its input groups (`input_groups.block_calls`)."""
    streams: tuple[str, ...]
    """Its arguments that change from block to block, the video's first."""
    outputs: tuple[tuple[OutputLayer, ...], ...] = ()
    """Layers that are added to the stream, level by level."""

    def __call__(self, block: nn.Module, streams: Streams, constants: Constants) -> Streams:
        """Calls `block` as it was called when it was recorded, on `streams`; returns those of the next block."""
        self._prepare_core(block, constants)
        outputs = block(**constants.arguments(self.name), **streams)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {argument: outputs[place] for place, argument in stream_names(self.family, block).items()}

    def rows(self, block: nn.Module, streams: Streams, constants: Constants, rows: Tensor) -> Tensor:
        """The rows `rows` of all outputs, joined: `[R, d]`, computed for these tokens alone.

        Args:
            rows: int64 `[R]`, some video tokens and after them all text tokens. An attention core must take fewer queries
                than keys: dense attention does, a band does not.
        """
        assert self.family.rows is not None, f"{self.family.name} has no rows"
        self._prepare_core(block, constants)
        return self.family.rows(block, {**constants.arguments(self.name), **streams}, rows)[0]

    def set_core(self, block: nn.Module, core: AttentionCore | None) -> None:
        """Makes `block` attend with `core` from now on. One with a method `prepare` is given the `Constants` of every call."""
        set_attention_core(self.family, block, core)

    def watch_attention(
        self, block: nn.Module, observe: Callable[[Tensor, Tensor, Tensor], None]
    ) -> AbstractContextManager[None]:
        """While open, every call of `block` hands `observe` its queries, keys and values `[H, L, D]`."""
        return watch_attention(self.family, block, observe)

    def _prepare_core(self, block: nn.Module, constants: Constants) -> None:
        prepare = getattr(attention_core(self.family, block), "prepare", None)
        if prepare is not None:
            prepare(constants)


def by_token(function: Callable[..., Tensor], *streams: Streams) -> Tensor:
    """`function` of the same stream `[N, d]` in each of `streams`, its rows one after the other as attention sees them."""
    return torch.cat([function(*(given[name].squeeze(0) for given in streams)) for name in streams[0]])


def joined(streams: Streams) -> Tensor:
    """All tokens `[L, d]`, where the streams are as wide."""
    return by_token(lambda x: x, streams)


def joined_rows(streams: Streams, rows: Tensor) -> Tensor:
    """`joined(streams)[rows]`: some tokens of the video, and all of the text."""
    video, *text = (stream.squeeze(0) for stream in streams.values())
    num_rows = len(rows) - sum(map(len, text))
    return torch.cat([video.index_select(0, rows[:num_rows]), *text])


def without_padding(family: Family, call: Arguments) -> dict[str, Any]:
    """The arguments of a transformer's call for one video, without the text's padding where that changes no real token.

    Raises:
        ValueError: the text is nothing but padding.
    """
    kept: dict[str, Any] = {name: call[name][:, :0] for name in family.absent if not bool(call[name].any())}
    for index, (text, mask) in enumerate(family.padding):
        valid = call[mask][0].bool()
        if family.needs_text and index == 0 and not bool(valid.any()):
            raise ValueError(f"a sample has 0 text tokens: {family.name}'s blocks need at least 1; give it a prompt")
        kept |= {text: call[text][:, valid], mask: call[mask][:, valid]}
    return {**call, **kept}


def real_text(family: Family, call: Arguments) -> Tensor | slice:
    """Index of the tokens that are no padding in the text `[N, d]` that blocks see in a call for one video."""
    masks: list[Tensor] = [call[mask][0].bool() for _, mask in family.padding]
    if len(masks) == 1:
        return masks[0]
    there = (call[name].shape[1] for name in family.absent if bool(call[name].any()))
    return slice(int(sum(mask.sum() for mask in masks)) + sum(there) if masks else None)


def of_element(call: Arguments, item: int, batch: int) -> dict[str, Any]:
    """The arguments of a transformer's call for one element of its batch."""
    return {
        name: value[item : item + 1] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value
        for name, value in call.items()
    }


def num_text(family: Family, streams: Streams) -> int:
    """Text tokens among the keys of the self-attention."""
    return 0 if family.text == "apart" else sum(x.shape[1] for name, x in streams.items() if name != "hidden_states")


class Recording:
    """Calls of blocks, seen in one pass of a transformer for one video."""

    def __init__(self, family: Family, transformer: nn.Module, call: Arguments, boundaries: Sequence[str]) -> None:
        """
        Args:
            call: arguments of the transformer's call.
            boundaries: blocks whose streams are seen.
        """
        self._family, self._transformer, self._call = family, transformer, call
        self._config: Any = getattr(transformer, "config", {})
        names = family.block_names(self._config)
        self._boundaries = boundaries
        firsts = list({block_list(name): name for name in reversed(names)}.values())
        order = [name for name in names if name in {*boundaries, *firsts}]
        self.last = order[-1]
        """The block in front of which all has been seen."""
        self._seen, self._firsts = order, firsts
        self.constants: Constants | None = None

    @contextmanager
    def watching(self, see: Callable[[str, Streams | None], None]) -> Iterator[None]:
        """While open, `see` is called with the streams in front of every boundary, as soon as the model is there; in front of
        other blocks of which something is recorded, with None."""
        with ExitStack() as hooks:
            for name in self._seen:
                block = self._transformer.get_submodule(name)

                def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    self._record(name, module, arguments(module, args, kwargs), see)

                hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            yield

    def _record(self, name: str, block: nn.Module, call: Arguments, see: Callable[[str, Streams | None], None]) -> None:
        streams = streams_of(self._family, block, call)
        if name in self._firsts:
            layout = self._family.layout(self._config, self._call, num_text(self._family, streams))
            calls = {} if self.constants is None else self.constants.calls
            own, timestep = constants_of(self._family, block, call), self._call["timestep"]
            if timestep.ndim == 2:
                own |= {key: RepeatedRows.by_timestep(own[key], timestep) for key in self._family.token_rows}
            calls = {**calls, block_list(name): own}
            self.constants = Constants(calls, layout)
        see(name, streams if name in self._boundaries else None)
