"""Records what sparse attention would miss while a model runs with dense attention over one trajectory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.attention.head_kind import sampled_rows
from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.calibration.residual_drift import ResidualDrift, missed_rows
from reelquant.tokens import band_width


class ResidualWatch:
    """Keeps the residual of every block and step at some rows, in host memory: `4 T H R D` bytes a block."""

    def __init__(
        self,
        family: ModuleType,
        config: Mapping[str, Any],
        spec: SparseAttentionSpec,
        latent_shape: tuple[int, ...],
    ) -> None:
        """`latent_shape` is `[..., C, F, H, W]`; `spec` has a kind for every head of the blocks that may run sparse."""
        self._family, self._config, self._spec, self._shape = family, config, spec, latent_shape
        self._missed: dict[str, list[Tensor]] = {}
        self._norms: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def watching(self, transformer: nn.Module) -> Iterator[None]:
        """While open, every step of the one generation that runs is recorded."""
        names = [n for n in self._family.block_names(self._config) if n not in self._spec.dense_blocks]
        with contextlib.ExitStack() as watched:
            for name in names:
                block = transformer.get_submodule(name)
                watched.enter_context(self._family.watch_attention(block, partial(self._observe, name)))
            yield

    def add_to(self, drift: ResidualDrift) -> None:
        """Adds every block to `drift`, and keeps nothing."""
        for name, missed in self._missed.items():
            drift.add(torch.stack(missed), self._norms[name])
        self._missed, self._norms = {}, {}

    def _observe(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        grid = self._family.token_layout(self._config, self._shape, 0)
        layout = self._family.token_layout(self._config, self._shape, q.shape[1] - grid.num_video)
        width, rows = band_width(layout, self._spec.density), sampled_rows(layout, device=q.device)
        missed, dense = missed_rows(q, k, v, kinds=self._spec.head_kinds[name], layout=layout, width=width, rows=rows)
        self._missed.setdefault(name, []).append(missed.cpu())
        self._norms.setdefault(name, []).append(float(dense.double().square().sum()))
