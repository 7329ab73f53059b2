"""The attention of a transformer that was calibrated for sparse attention: dense, refreshed or sparse with its residual.

    step      0        1        2        3        4        5   …
    runs      refresh  sparse + residual of step 0 …       refresh

A refresh runs both ways and keeps what the band misses (`ResidualCache`); the steps between add it. All that is kept
belongs to one generation (`runtime.generation`) and one element of its batch, and lies in that generation's memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from reelquant.attention.head_kind import band_errors, kinds_of, sampled_rows
from reelquant.attention.residual_cache import ResidualCache
from reelquant.attention.sparse_spec import StepKind
from reelquant.ops.band_attention.op import (
    Correction,
    band_attention,
    dense_and_band_attention,
    dense_attention,
)
from reelquant.ops.eight_bit_attention.op import NEEDS as EIGHT_BITS
from reelquant.ops.implementation import obstacle
from reelquant.runtime.configurable_attention import AttentionPrecision, ConfigurableAttention, Visited
from reelquant.runtime.generation import GenerationState, current_pass
from reelquant.tokens import TokenLayout, band_width, visited_pairs

__all__ = ["AttentionPrecision", "BlockAttention", "SparseAttention", "Visited"]

logger = logging.getLogger(__name__)


class SparseAttention(ConfigurableAttention):
    """What `transformer.sparse_attention` is: `enabled = False` turns the transformer dense, `True` back; `configure` changes
    what the checkpoint says of its attention. Attributes are those of `ConfigurableAttention`."""

    def attend(self, block: str, item: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `block` for batch element `item`: `[H, L, D]`, text last and without padding -> `[H, L, D]`; or
        `[n H, L, D]` of n elements with as many tokens, the first of which is `item`, and always the same in a generation.

        Latents so small that the band is narrower than one token run dense, with a warning.
        """
        state = current_pass()
        tokens = q.shape[1]
        layout = self._layout(state, tokens)
        width = self._width(state, layout) if self.enabled else None
        kind = "dense" if width is None or block in self.spec.dense_blocks else self._kind(state)
        visited = visited_pairs(layout, width) if kind == "sparse" and width is not None else tokens**2
        self.visited.add(visited, tokens**2)
        if width is None or kind == "dense":
            return dense_attention(q, k, v, precision=self._runs_in(q).dense)
        cache = self._cache(state, block, item)
        renew = kind == "refresh" or self.spec.residual.order == 0
        kinds = self._kinds(state, (block, item), (q, k, v), layout=layout, width=width, renew=renew)
        if kind == "refresh":
            dense, sparse = self._both(q, k, v, kinds, layout, width)
            cache.refresh(state.step, dense, sparse)
            return dense
        corrections = cache.corrections(state.step, q) if q.is_cuda else None
        if corrections is None:
            return cache.correct(state.step, self._sparse(q, k, v, kinds, layout, width))
        return self._sparse(q, k, v, kinds, layout, width, corrections=corrections)

    def _kind(self, state: GenerationState) -> StepKind:
        """The step's, the same for all blocks; counted from the generation's first step that is not above the threshold."""
        memory, level = state.memory, state.noise_level
        last_step, before, _ = memory.get("kind", (None, None, None))
        if last_step != state.step:
            if level <= self.spec.dense_above:
                memory.setdefault("first below", state.step)
            num_below = state.step - memory.get("first below", state.step)
            memory["kind"] = (state.step, level, self.spec.kind_of_step(level, num_below, before))
        kind: StepKind = memory["kind"][2]
        return kind

    def _both(
        self, q: Tensor, k: Tensor, v: Tensor, kinds: str, layout: TokenLayout, width: int
    ) -> tuple[Tensor, Tensor]:
        precision = self._runs_in(q)
        if precision.sparse == precision.dense != "full":
            return dense_and_band_attention(
                q,
                k,
                v,
                kinds=kinds,
                layout=layout,
                width=width,
                implementation=self.implementation,
                precision=precision.dense,
            )
        dense = dense_attention(q, k, v, precision=precision.dense)
        return dense, self._sparse(q, k, v, kinds, layout, width)

    def _sparse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kinds: str,
        layout: TokenLayout,
        width: int,
        *,
        corrections: Sequence[Correction] = (),
    ) -> Tensor:
        return band_attention(
            q,
            k,
            v,
            kinds=kinds,
            layout=layout,
            width=width,
            corrections=corrections,
            implementation=self.implementation,
            precision=self._runs_in(q).sparse,
        )

    def _runs_in(self, q: Tensor) -> AttentionPrecision:
        if self.precision != AttentionPrecision() and q.is_cuda and _lacks_eight_bits(q.device):
            return AttentionPrecision()
        return self.precision

    def _kinds(
        self,
        state: GenerationState,
        key: tuple[str, int],
        qkv: tuple[Tensor, Tensor, Tensor],
        *,
        layout: TokenLayout,
        width: int,
        renew: bool,
    ) -> str:
        """Head kinds of `key`, a block and an element of the batch."""
        if not self.spec.online:
            kinds = self.spec.head_kinds[key[0]]
            return kinds * (qkv[0].shape[0] // len(kinds))
        found: dict[tuple[str, int], str] = state.memory.setdefault("kinds", {})
        if renew or key not in found:
            rows = sampled_rows(layout, device=qkv[0].device)
            found[key] = kinds_of(band_errors(*qkv, layout=layout, width=width, rows=rows))
        return found[key]

    def _cache(self, state: GenerationState, block: str, item: int) -> ResidualCache:
        caches: dict[tuple[str, int], ResidualCache] = state.memory.setdefault("residuals", {})
        if (block, item) not in caches:
            caches[block, item] = ResidualCache(**vars(self.spec.residual))
        return caches[block, item]

    def _width(self, state: GenerationState, layout: TokenLayout) -> int | None:
        """Band width of the specification's density; None where it is narrower than one token."""
        widths: dict[TokenLayout, int | None] = state.memory.setdefault("widths", {})
        if layout not in widths:
            try:
                widths[layout] = band_width(layout, self.spec.density)
            except ValueError as error:
                widths[layout] = None
                self._say_dense(state, layout, error)
        return widths[layout]

    def _say_dense(self, state: GenerationState, layout: TokenLayout, error: ValueError) -> None:
        """Once for latents of a shape. Where all frames are an image's, nothing else was asked for."""
        case = self.spec.density, state.latent_shape
        if layout.banded.num_video and case not in self._too_small:
            self._too_small.add(case)
            logger.warning(
                "latents %s are too small for sparse attention (%s): it runs dense", list(state.latent_shape), error
            )

    def _layout(self, state: GenerationState, tokens: int) -> TokenLayout:
        frames, height, width = state.grid
        return TokenLayout(frames, height, width, tokens - frames * height * width, self.spec.dense_frames)


@dataclass(frozen=True)
class BlockAttention:
    """`SparseAttention.attend` of one block: its attention core."""

    sparse: SparseAttention
    block: str
    takes_many = True

    def __call__(self, item: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.sparse.attend(self.block, item, q, k, v)


@lru_cache(maxsize=64)
def _lacks_eight_bits(device: torch.device) -> bool:
    """Whether the kernels of attention in 8 bits cannot run there; says so once."""
    found = obstacle(device, EIGHT_BITS)
    if found is not None:
        logger.warning("attention in 8 bits cannot run (%s): it runs in full precision", found)
    return found is not None
