"""The attention terms of a block's loss while it is learned: how much each counts, and how they fall."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from reelquant.calibration.attention_distillation import AttentionTargets, global_loss, local_loss
from reelquant.calibration.block_call import BlockCall
from reelquant.settings.recipe import Recipe


class AttentionTerms:
    """The attention terms of a block's loss (MSAD, QuantSparse eq. 9), with their weights and their course."""

    def __init__(self, call: BlockCall, block: nn.Module, recipe: Recipe) -> None:
        self._call, self._block = call, block
        wanted = recipe.attention_distillation if recipe.distills_attention else "none"
        self._losses = {
            name: loss for name, loss in (("global", global_loss), ("local", local_loss)) if wanted in (name, "both")
        }
        self._weights: dict[str, float | str] = {"global": recipe.lambda_global, "local": recipe.lambda_local}
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._epoch: dict[str, list[float]] = {name: [] for name in self._losses}
        self.history: dict[str, list[float]] = {name: [] for name in self._losses}
        """Weighted mean of every epoch, by term."""

    def watching(self) -> AbstractContextManager[None]:
        """While open, the block's queries and keys are kept for `weighted`."""
        self._seen.clear()
        if not self._losses:
            return nullcontext()
        return self._call.watch_attention(self._block, lambda q, k, _v: self._seen.append((q, k)))

    def values(self, targets: AttentionTargets) -> dict[str, Tensor]:
        """The terms of the call that was watched, without weights; it is forgotten."""
        [seen] = self._seen
        self._seen.clear()
        return {name: loss(targets, *seen) for name, loss in self._losses.items()}

    def weighted(self, targets: AttentionTargets, error: Tensor) -> Tensor:
        """Sum of the weighted terms of the call that was watched; `auto` weights are fixed here at the first call."""
        total = torch.zeros_like(error)
        for name, value in self.values(targets).items():
            weight = self._weights[name]
            if isinstance(weight, str):
                exact = float(value.detach())
                weight = float(error.detach()) / exact if exact > 0 else 0.0
                self._weights[name] = weight
            total = total + weight * value
            self._epoch[name].append(weight * float(value.detach()))
        return total

    def end_epoch(self) -> None:
        """Adds the epoch's means to `history`."""
        for name, values in self._epoch.items():
            self.history[name].append(sum(values) / len(values))
            values.clear()
