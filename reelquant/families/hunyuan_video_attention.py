"""HunyuanVideo's attention with an exchangeable core: projections, norms and rotary embedding as in diffusers' own.

The core sees one sample without its padding, so no mask is ever passed on; the rows of padding tokens come out as zeros
(no real token sees them, in this model or in diffusers').
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn

from reelquant.families.attention_core import WatchingCore, plain_core
from reelquant.families.family import AttentionCore

TOGETHER = 2**24
"""Numbers of the queries of elements that are attended together: a small model's time goes into launches, not into work."""


_handles = itertools.count()
_processors: weakref.WeakValueDictionary[int, CoreAttentionProcessor] = weakref.WeakValueDictionary()
"""Processors by the number with which compiled code names them."""


class CoreAttentionProcessor:
    """diffusers attention processor that hands queries, keys and values to `core`."""

    def __init__(self, core: AttentionCore) -> None:
        self.core = core
        self._register()

    def _register(self) -> None:
        number = next(_handles)
        # A tensor is an input of compiled code; a number would be a constant of it, and every block compiled anew.
        self._handle = torch.tensor(number, device="cpu")
        _processors[number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"core": self.core}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.core = state["core"]
        self._register()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`hidden_states [B, n, d]`, `encoder_hidden_states [B, m, d]`, `attention_mask [B, 1, 1, n + m]` bool, or the text's
        alone `[B, m]`."""
        num_text = encoder_hidden_states.shape[1]
        separate = attn.add_q_proj is not None
        joint = hidden_states if separate else joined_streams(hidden_states, encoder_hidden_states)
        query, key, value = (_heads(attn, layer(joint)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = _normalized(attn.norm_q, query), _normalized(attn.norm_k, key)
        query, key = (_rotated(x, image_rotary_emb, num_text=0 if separate else num_text) for x in (query, key))
        if separate:
            text = encoder_hidden_states
            more = [_heads(attn, layer(text)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
            query = torch.cat([query, _normalized(attn.norm_added_q, more[0])], dim=1)
            key = torch.cat([key, _normalized(attn.norm_added_k, more[1])], dim=1)
            value = torch.cat([value, more[2]], dim=1)
        # Compiled code sees one operation: lengths are read from the mask, and the core may keep state.
        compiling = torch.compiler.is_compiling()
        attended = (
            torch.ops.reelquant.attend(query, key, value, attention_mask, self._handle)
            if compiling
            else self._attend(query, key, value, attention_mask)
        )
        out = attended.flatten(2, 3).to(query.dtype)
        video, text_out = out.split((out.shape[1] - num_text, num_text), dim=1)
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text_out = attn.to_add_out(text_out)
        return video, text_out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, L, H, D]` three times -> `[B, L, H, D]`."""
        batch, length = query.shape[:2]
        masked = [] if mask is None else [length - mask.shape[-1] + valid for valid in _valid_lengths(mask)]
        lengths = masked * batch if len(masked) == 1 else masked or [length] * batch
        if len(lengths) != batch:
            raise ValueError(
                f"the text's mask has {len(lengths)} rows for {batch} videos: pass one for each, or one for all"
            )
        if batch > 1 and query.numel() <= TOGETHER and getattr(self.core, "takes_many", False):
            return self._attend_together(query, key, value, lengths)
        outputs = []
        for item, valid in enumerate(lengths):
            q, k, v = (x[item, :valid].transpose(0, 1) for x in (query, key, value))
            out = self.core(item, q, k, v).transpose(0, 1)
            outputs.append(torch.cat([out, out.new_zeros(length - valid, *out.shape[1:])]) if valid < length else out)
        return torch.stack(outputs)

    def _attend_together(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """As `_attend`, elements of one length at a time."""
        outputs: list[Tensor | None] = [None] * len(lengths)
        for valid in dict.fromkeys(lengths):
            items = [item for item, length in enumerate(lengths) if length == valid]
            q, k, v = (
                torch.stack([x[item, :valid] for item in items]).transpose(1, 2).flatten(0, 1)
                for x in (query, key, value)
            )
            out = self.core(items[0], q, k, v).unflatten(0, (len(items), -1)).transpose(1, 2)
            padded = nn.functional.pad(out, (0, 0, 0, 0, 0, query.shape[1] - valid))
            for item, one in zip(items, padded, strict=True):
                outputs[item] = one
        return torch.stack([out for out in outputs if out is not None])


_last_lengths: tuple[weakref.ref[Tensor], int, list[int]] | None = None
"""The last mask, its version, and its rows' lengths."""


def _valid_lengths(mask: Tensor) -> list[int]:
    """Tokens that every row of `mask` `[B, ..., L]` leaves. All blocks of a step get one mask, which is read from the device
    once: a read waits for all that the device has to do."""
    global _last_lengths
    last = _last_lengths
    if mask.is_inference():  # has no version: a change in place would not be seen
        return [int(length) for length in mask.reshape(len(mask), -1).sum(dim=1).tolist()]
    if last is None or last[0]() is not mask or last[1] != mask._version:
        lengths = [int(length) for length in mask.reshape(len(mask), -1).sum(dim=1).tolist()]
        last = _last_lengths = (weakref.ref(mask), mask._version, lengths)
    return last[2]


@torch.library.custom_op("reelquant::attend", mutates_args=())
def _attend_op(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, handle: Tensor) -> Tensor:
    return _processors[int(handle)]._attend(query, key, value, mask).to(query.dtype).contiguous()


@_attend_op.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def core_processor(core: AttentionCore | None) -> Any:
    """The processor that attends with `core`; diffusers' own for None."""
    return HunyuanVideoAttnProcessor2_0() if core is None else CoreAttentionProcessor(core)


def attend_rows(
    attn: Any, inputs: Tensor, chosen: Tensor, *, rows: Tensor, rotary: tuple[Tensor, Tensor], text: Tensor | None
) -> Tensor:
    """Attention of some tokens to all, before the output projection: `[1, R, d]`.

    Only they ask: queries of the others are made where `attention_core.watch_attention` is open, and never attended with.

    Args:
        inputs: `[1, L, d]` the normalized stream; only the video's `[1, n, d]` where the text has projections of its own.
        chosen: `[1, R, d]` (or the video's) of `inputs`, at `rows`.
        rows: int64 `[R]` of the joint stream; after those of the video come all text tokens.
        text: `[1, m, d]` where the text has projections of its own.
    """
    core = _core_of(attn)
    num_text = inputs.shape[1] - len(rotary[0])
    if isinstance(core, WatchingCore):
        asked, tables = inputs, rotary
    else:
        video_rows = rows[: chosen.shape[1] - num_text]
        asked, tables = chosen, (rotary[0][video_rows], rotary[1][video_rows])
    query = _rotated(_normalized(attn.norm_q, _heads(attn, attn.to_q(asked))), tables, num_text=num_text)
    key = _rotated(_normalized(attn.norm_k, _heads(attn, attn.to_k(inputs))), rotary, num_text=num_text)
    value = _heads(attn, attn.to_v(inputs))
    if text is not None:
        more = [_heads(attn, layer(text)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        query = torch.cat([query, _normalized(attn.norm_added_q, more[0])], dim=1)
        key = torch.cat([key, _normalized(attn.norm_added_k, more[1])], dim=1)
        value = torch.cat([value, more[2]], dim=1)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if isinstance(core, WatchingCore):
        core = core.watched(q, k, v)
        q = q.index_select(1, rows)
    out: Tensor = core(0, q, k, v).transpose(0, 1).flatten(1).unsqueeze(0)
    return out.to(query.dtype)


def _core_of(attention: Any) -> AttentionCore:
    core: AttentionCore = getattr(attention.processor, "core", plain_core)
    return core


def joined_streams(video: Tensor, text: Tensor) -> Tensor:
    """Both streams in one tensor: the very one that they are views of, if it is there."""
    base = None if torch.compiler.is_compiling() else video._base
    if base is not None and base is text._base and base.shape[1] == video.shape[1] + text.shape[1]:
        starts = video.storage_offset() - base.storage_offset(), text.storage_offset() - base.storage_offset()
        if starts == (0, video.shape[1] * base.stride(1)):
            return base
    if not torch.compiler.is_compiling() and video.is_inference() and _are_adjacent(video, text):
        # Inference tensors do not know what they are views of.
        return video.as_strided((len(video), video.shape[1] + text.shape[1], video.shape[2]), video.stride())
    return torch.cat([video, text], dim=1)


def _are_adjacent(video: Tensor, text: Tensor) -> bool:
    n, row = video.shape[1], video.stride(1)
    return (
        video.untyped_storage().data_ptr() == text.untyped_storage().data_ptr()
        and text.storage_offset() == video.storage_offset() + n * row
        and video.stride() == text.stride() == ((n + text.shape[1]) * row, row, 1)
    )


def _heads(attn: Any, x: Tensor) -> Tensor:
    heads: Tensor = x.unflatten(2, (attn.heads, -1))
    return heads


def _normalized(norm: nn.Module | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    out: Tensor = norm(x)
    return out


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor] | None, *, num_text: int) -> Tensor:
    if rotary is None:
        return x
    if not num_text:
        rotated: Tensor = apply_rotary_emb(x, rotary, sequence_dim=1)
        return rotated
    num_video = x.shape[1] - num_text
    return torch.cat([apply_rotary_emb(x[:, :num_video], rotary, sequence_dim=1), x[:, num_video:]], dim=1)
