"""Records what sparse attention would miss while a model runs with dense attention over one trajectory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from reelquant.attention.head_kind import sampled_rows
from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.calibration.residual_drift import ResidualDrift, missed_rows
from reelquant.families.attention_core import watch_attention
from reelquant.families.family import Arguments, Config, Family
from reelquant.tokens import band_width


class ResidualWatch:
    """Keeps the residual of every block and step at some rows, in host memory: `4 T H R D` bytes a block."""

    def __init__(
        self,
        family: Family,
        config: Config,
        spec: SparseAttentionSpec,
        call: Arguments,
    ) -> None:
        """
        Args:
            spec: has a kind for every head of the blocks that may run sparse.
            call: arguments of a call of the transformer.
        """
        self._family, self._config, self._spec = family, config, spec
        self._grid = family.layout(config, call, 0)
        self._missed: dict[str, list[Tensor]] = {}
        self._norms: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def watching(self, transformer: nn.Module) -> Iterator[None]:
        """While open, every step of the one generation that runs is recorded."""
        names = [n for n in self._family.block_names(self._config) if n not in self._spec.dense_blocks]
        with contextlib.ExitStack() as watched:
            for name in names:
                block = transformer.get_submodule(name)
                watched.enter_context(watch_attention(self._family, block, partial(self._observe, name)))
            yield

    def add_to(self, drift: ResidualDrift) -> None:
        """Adds every block to `drift`, and keeps nothing."""
        for name, missed in self._missed.items():
            drift.add(torch.stack(missed), self._norms[name])
        self._missed, self._norms = {}, {}

    def _observe(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        layout = replace(self._grid, num_text=q.shape[1] - self._grid.num_video)
        width, rows = band_width(layout, self._spec.density), sampled_rows(layout, device=q.device)
        missed, dense = missed_rows(q, k, v, kinds=self._spec.head_kinds[name], layout=layout, width=width, rows=rows)
        self._missed.setdefault(name, []).append(missed.cpu())
        self._norms.setdefault(name, []).append(float(dense.double().square().sum()))
