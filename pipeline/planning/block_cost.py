"""What calibrating one block takes, counted by running its code on the meta device; `stage_cost` says what is in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.context import RunContext
from pipeline.planning.meta_run import META, bytes_of, run_on_meta, tensors_of, to_dtype
from pipeline.planning.operations import ATTENTION_FLOPS, FLEX_FLOPS, Operations
from pipeline.planning.store_size import hidden_size
from pipeline.planning.token_counts import TokenCounts
from reelquant.calibration.attention_distillation import AttentionTargets
from reelquant.calibration.attention_terms import AttentionTerms
from reelquant.calibration.block_distillation import Sample, SampleView, calibrated_copy, step_error
from reelquant.calibration.recipe import Recipe
from reelquant.ops.band_attention.op import FLEX_TOKENS
from workers.messages import MethodPlan


@dataclass(frozen=True)
class BlockCost:
    """What calibrating one block takes."""

    weight_bytes: int
    """Of the block itself."""
    extra_bytes: int
    """That calibrating it takes beside, without the streams of the samples."""
    operations: Operations
    """On all samples."""


class BlockCosts:
    """Counts the calibration of a run's blocks.

    Args:
        dtype: of weights and activations.
    """

    def __init__(self, context: RunContext, counts: TokenCounts, dtype: torch.dtype) -> None:
        self._context, self._counts, self._dtype = context, counts, dtype

    def block(self, name: str) -> nn.Module:
        """Full precision's, on the meta device."""
        with META:
            block = self._context.model.family.build_block(self._context.model.config, name)
        return to_dtype(block, self._dtype).requires_grad_(False)

    def sample(self) -> Sample:
        """The longest one, on the meta device."""
        model, layout = self._context.model, self._counts.layout
        length, width = self._counts.longest_stream, hidden_size(self._context)
        stream = torch.empty(length, width, dtype=self._dtype, device=META)
        table = torch.empty(layout.num_video, int(model.config["attention_head_dim"]), device=META)
        temb = torch.empty(1, width, dtype=self._dtype, device=META)
        conditioning = model.family.Conditioning(
            temb, (table, table), replace(layout, num_text=length - layout.num_video)
        )
        return Sample(stream, stream, conditioning, target=stream, weights=torch.empty(length, device=META))

    def calibration(self, method: MethodPlan) -> dict[str, BlockCost]:
        """By name of the block; equal ones are counted once."""
        family = self._context.model.family
        known: dict[Any, BlockCost] = {}
        costs = {}
        for name in self._context.model.blocks:
            inside = tuple((layer, bits) for layer, bits in method.bits.items() if layer.startswith(f"{name}."))
            layers = tuple((layer.removeprefix(name), bits) for layer, bits in inside)
            key = (family.group_levels(name), layers, self._attention(name, method.recipe))
            if key not in known:
                known[key] = self._cost(name, method)
            costs[name] = known[key]
        return costs

    def _cost(self, name: str, method: MethodPlan) -> BlockCost:
        family, recipe = self._context.model.family, method.recipe
        block = self.block(name)
        weights, levels = bytes_of(block), family.group_levels(name)
        bits = {k.removeprefix(f"{name}."): v for k, v in method.bits.items() if k.startswith(f"{name}.")}
        sample = self.sample()

        made: list[nn.Module] = []

        def make() -> None:
            copied, _ = calibrated_copy(block, levels, bits=bits, recipe=recipe, activation_amax={})
            made.append(copied)

        making = run_on_meta(make, holding=tensors_of(block))
        [copied] = made
        held = tensors_of(block) + tensors_of(copied)
        if not recipe.needs_activations:
            return BlockCost(weights, making.peak_bytes - weights, Operations.of(making))

        here, targets = sample.at(block), self._attention_targets(recipe)
        step = partial(_step_loss, family, copied, here, recipe, targets)
        learning = run_on_meta(step, holding=held + _tensors_in(targets), gradients=recipe.learns)
        everything = replace(recipe, tokens_per_step=1.0)
        quantized = run_on_meta(partial(step_error, family, copied, here, everything, seed=0), holding=held)
        peak = max(making.peak_bytes, learning.peak_bytes, quantized.peak_bytes)
        seen, slower = self._attention(name, recipe)
        forward = Operations.of(run_on_meta(lambda: family.call_block(block, sample.quantized, sample.conditioning)))
        length, width = sample.quantized.shape
        passes = 1.0  # for the targets
        passing = _with_attention(Operations.of(quantized), seen)
        operations = passing * 3  # loss before and after, the stream to the next block
        if recipe.token_weights:
            operations += Operations(attention=4.0 * length * length * width)  # column sums: the scores twice
        if recipe.channel_scale == "smoothquant":
            passes += len(levels) - 1
        rounding = 0
        if recipe.rounding == "gptq":
            more, hessians, rounding = self._gptq(name, method)
            passes, operations = passes + more, operations + hessians
        operations += forward * passes
        if recipe.learns:
            operations += _with_attention(Operations.of(learning), seen * slower) * recipe.epochs
        extra = max(peak - weights, weights + rounding)
        operations *= self._context.config.selection.num_samples
        # Once a block: its clips are searched for; both blocks run for what is told of its layers.
        return BlockCost(weights, extra, operations + Operations.of(making) + forward + passing)

    def _gptq(self, name: str, method: MethodPlan) -> tuple[int, Operations, int]:
        """Of rounding a block by GPTQ, a sample: forward passes, operations of its Hessians; and the bytes that it takes."""
        inputs, both = self._group_inputs(name, method), 2 if method.recipe.solve == "asymmetric" else 1
        passes = both * (len(inputs) - 1)  # up to each level of layers, the first one's inputs being the block's
        groups = [group for level in inputs for group in level]
        hessians = Operations(float32=both * sum(2.0 * rows * d * d for rows, d in groups))
        return passes, hessians, max(8 * rows * d + 16 * d * d for rows, d in groups)

    def _attention_targets(self, recipe: Recipe) -> AttentionTargets | None:
        """What the loss has of the full-precision attention, on the meta device."""
        if not (recipe.learns and recipe.distills_attention):
            return None
        model, length = self._context.model, self._counts.longest_stream
        heads, size = model.family.num_heads(model.config)
        k = torch.empty(heads, length, size, dtype=self._dtype, device=META)
        pooled = torch.empty(heads, -(-length // recipe.pool_size), size, device=META)
        salient = torch.empty(min(recipe.num_salient_tokens, length), dtype=torch.int64, device=META)
        asking = k.index_select(1, salient)
        return AttentionTargets((heads, length, size), recipe.pool_size, pooled, pooled, salient, asking, k)

    def _attention(self, name: str, recipe: Recipe) -> tuple[float, float]:
        """What of the attention map a block sees while it is calibrated, and how much longer it takes with gradients."""
        sparse = recipe.sparse
        banded = sparse is not None and sparse.attention != "dense" and name not in sparse.dense_blocks
        config = self._context.config
        fixed = config.numerics.deterministic and self._dtype.itemsize == 2
        long = config.workers.num_gpus > 0 and self._counts.longest_stream >= FLEX_TOKENS
        return (
            sparse.density if sparse is not None and banded else 1.0,
            ATTENTION_FLOPS / FLEX_FLOPS if long and (banded or fixed) else 1.0,
        )

    def _group_inputs(self, name: str, method: MethodPlan) -> list[list[tuple[int, int]]]:
        """`(tokens, inputs)` of every input group that reads tokens, by level."""
        model, layout = self._context.model, self._counts.layout
        text = self._counts.longest_stream - layout.num_video
        rows = {"video": layout.num_video, "text": text, "joint": layout.num_video + text}
        levels = [
            [
                (rows[group.stream], model.linears[f"{name}.{group.layers[0]}"][1])
                for group in level
                if group.stream in rows and any(f"{name}.{layer}" in method.bits for layer in group.layers)
            ]
            for level in model.family.group_levels(name)
        ]
        return [level for level in levels if level]


def _step_loss(
    family: ModuleType, block: nn.Module, sample: SampleView, recipe: Recipe, targets: AttentionTargets | None
) -> Tensor:
    """The loss of one learning step, with its attention terms if there are `targets`."""
    if targets is None:
        return step_error(family, block, sample, recipe, seed=0)
    terms = AttentionTerms(family, block, recipe)
    with terms.watching():
        error = step_error(family, block, sample, recipe, seed=0)
    return error + sum(terms.values(targets).values())


def _tensors_in(targets: AttentionTargets | None) -> list[Tensor]:
    return [] if targets is None else [x for x in vars(targets).values() if isinstance(x, Tensor)]


def _with_attention(operations: Operations, factor: float) -> Operations:
    return replace(operations, attention=operations.attention * factor)
