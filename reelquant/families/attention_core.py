"""The one seam of all families' self-attention: what takes queries, keys and values there is an exchangeable core.

    processor of the family  ->  core            where it has one (`Family.processor`)
    diffusers' own processor ->  torch's `scaled_dot_product_attention`, which the core takes the place of

A core sees one sample without its padding, so no mask is passed on; rows of padding come out as zeros.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reelquant.families.family import AttentionCore, Family, Text

LARGE = -1e4
"""Summands of scores up to here mask a key."""
_open = threading.local()


def set_attention_core(family: Family, block: nn.Module, core: AttentionCore | None) -> None:
    """Makes `block` compute its self-attention with `core` from now on, as diffusers does if there is none."""
    attention: Any = block.get_submodule(family.self_attention)
    if family.processor is not None:
        attention.set_processor(family.processor(core))
        return
    attached: AttachedCore | None = attention.__dict__.pop("attached_core", None)
    if attached is not None:
        attached.remove()
    if core is not None:
        attention.attached_core = AttachedCore(attention, core, family.text)


def attention_core(family: Family, block: nn.Module) -> AttentionCore | None:
    """The core of `block`, None where it has none."""
    attention: Any = block.get_submodule(family.self_attention)
    holder = attention.processor if family.processor is not None else attention.__dict__.get("attached_core")
    core: AttentionCore | None = getattr(holder, "core", None)
    return core


@contextmanager
def watch_attention(
    family: Family, block: nn.Module, observe: Callable[[Tensor, Tensor, Tensor], None]
) -> Iterator[None]:
    """While open, every call of `block` hands `observe` its queries, keys and values `[H, L, D]`, after norm and rotation."""
    previous = attention_core(family, block)
    set_attention_core(family, block, WatchingCore(previous or plain_core, observe))
    try:
        yield
    finally:
        set_attention_core(family, block, previous)


def plain_core(_item: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention by torch."""
    from reelquant.ops.band_attention.op import dense_attention

    return dense_attention(q, k, v)


class WatchingCore:
    """Hands every call's queries, keys and values to `observe`, then lets the core that was there attend."""

    def __init__(self, inner: AttentionCore, observe: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self.inner, self.observe = inner, observe
        if hasattr(inner, "prepare"):
            self.prepare = inner.prepare

    def __call__(self, item: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.watched(q, k, v)(item, q, k, v)

    def watched(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionCore:
        """Shows all watchers, this one and those inside, what they wait for; returns the core that attends."""
        self.observe(q, k, v)
        return self.inner.watched(q, k, v) if isinstance(self.inner, WatchingCore) else self.inner


class AttachedCore:
    """Hooks on a self-attention module that open and close its seam."""

    def __init__(self, attention: nn.Module, core: AttentionCore, text: Text) -> None:
        self.core, self._text = core, text
        self._handles = (
            attention.register_forward_pre_hook(self._enter, with_kwargs=True),
            attention.register_forward_hook(self._leave, always_call=True),
        )

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        seam = _Seam(self.core, text.shape[1] if self._text == "before" and text is not None else 0)
        stack = _open.__dict__.setdefault("seams", [])
        stack.append(seam)
        seam.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        seam = _open.seams.pop()
        seam.__exit__(None, None, None)
        if output is not None and not seam.num_attended:
            raise RuntimeError(
                f"{type(module).__name__} does not end in torch's scaled_dot_product_attention under this attention backend, "
                "so its attention cannot be replaced: set diffusers' attention backend to native"
            )


class _Seam(TorchFunctionMode):
    def __init__(self, core: AttentionCore, num_before: int) -> None:
        super().__init__()
        self._core, self._num_before = core, num_before
        self.num_attended = 0
        """Elements of the batch so far: some processors attend one by one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **(kwargs or {})}
        query, key, value = (
            given[name].roll(-self._num_before, dims=2) if self._num_before else given[name]
            for name in ("query", "key", "value")
        )
        mask = given.get("attn_mask")
        if mask is not None and self._num_before:
            raise ValueError("attention with text in front of the video has a mask of padding, which is not supported")
        out = attended(self._core, query, key, value, mask, first=self.num_attended)
        self.num_attended += len(query)
        return out.roll(self._num_before, dims=2) if self._num_before else out


def attended(
    core: AttentionCore, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, first: int = 0
) -> Tensor:
    """Attention of `[B, H, L, D]` by `core`, an element at a time and without its padding, whose rows are zeros.

    Args:
        first: number of the first element.

    Raises:
        ValueError: `mask` masks something else than the padding.
    """
    outputs = []
    for item in range(len(query)):
        q, k, v = (x[item] for x in (query, key, value))
        valid = None if mask is None else _valid_tokens(mask[min(item, len(mask) - 1)], q.shape[1])
        if valid is None:
            outputs.append(core(first + item, q, k, v))
            continue
        out = core(first + item, *(x.index_select(1, valid) for x in (q, k, v)))
        outputs.append(torch.zeros_like(q).index_copy(1, valid, out.to(q.dtype)))
    return torch.stack(outputs)


def _valid_tokens(mask: Tensor, num_tokens: int) -> Tensor | None:
    """Tokens that are no padding, by a mask `[H or 1, L or 1, L]`; None for all."""
    allowed = mask if mask.dtype == torch.bool else mask > LARGE
    keys = allowed.flatten(0, -2).any(dim=0)
    if bool(keys.all()) and bool(allowed.all()):
        return None
    rows = allowed if allowed.shape[-2] == 1 else allowed[:, keys]
    if keys.numel() != num_tokens or not bool((rows == keys).all()):
        raise ValueError("the attention mask is not one of padding alone: such attention cannot be replaced")
    return keys.nonzero().flatten()
