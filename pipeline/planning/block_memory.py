"""Peak memory of the work on single blocks, distillation and drift repair, by running that work on the meta device.

Of a GPU, one sample counts: the others wait in host memory. On a CPU each further sample takes what the one has kept. On a GPU
attention under a band counts as dense attention in a fused kernel, which is what FlexAttention takes. Quantized layers count as
their reference, which takes more than the kernels.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.context import RunContext
from pipeline.model_facts import ModelFacts
from pipeline.planning.meta_run import bytes_of, peak_on_meta, tensors_of, to_dtype
from pipeline.planning.model_size import planned_layers
from pipeline.planning.planned_calls import planned_call
from pipeline.planning.store_size import conditioning_width, num_conditioning_rows
from pipeline.planning.token_counts import TokenCounts
from reelquant.calibration.drift_repair import RepairSample, repair_block
from reelquant.calibration.sample import Sample
from reelquant.calibration.segment_distillation import distill_segment
from reelquant.calibration.without_values import META
from reelquant.quantization.linear import replace_linear_layers, share_group_tensors
from reelquant.settings.recipe import Recipe
from workers.distillation_worker import bits_inside
from workers.messages import MethodPlan
from workers.model_source import empty_block


def block_kinds(model: ModelFacts, method: MethodPlan) -> dict[str, Hashable]:
    """Kind by name of the block: calibrating blocks of one kind takes as much, as they have layers of the same shapes and bits,
    and the same attention."""
    dense = method.recipe.sparse is None
    return {
        name: (
            model.calls[name].levels,
            tuple(bits_inside(method, name).items()),
            dense or name in method.attention.dense_blocks,
        )
        for name in model.blocks
    }


class BlockMemory:
    """Counts the work on a run's blocks.

    Args:
        dtype: of weights and activations.
    """

    def __init__(self, context: RunContext, counts: TokenCounts, dtype: torch.dtype) -> None:
        self._context, self._dtype = context, dtype
        self._on_gpu = context.config.workers.num_gpus > 0
        self._call = planned_call(context, counts, dtype)
        self._weights = {name: bytes_of(self._block(name)) for name in context.model.blocks}

    @property
    def largest_block(self) -> int:
        """Bytes of its weights."""
        return max(self._weights.values())

    def distillation(self, method: MethodPlan) -> int:
        """Peak of distilling any segment: the weights of its blocks, and beside them the most that one of its blocks takes.
        Of every kind of block one is calibrated for one epoch, behind another of its kind where segments have several."""
        longest = max(len(segment) for segment in self._context.segments)
        extra: dict[Any, int] = {}
        kinds = block_kinds(self._context.model, method)
        for kind in kinds.values():
            alike = [name for name in kinds if kinds[name] == kind]
            if kind not in extra:
                extra[kind] = self._distill(method, alike[: min(2, longest)])
        beside = {name: extra[kind] for name, kind in kinds.items()}
        return max(
            sum(self._weights[name] for name in segment) + max(beside[name] for name in segment)
            for segment in self._context.segments
        )

    def drift_repair(self, method: MethodPlan) -> int:
        """Peak of repairing any block: of both models, at the highest."""
        kinds = block_kinds(self._context.model, method)
        return max(self._repair(method, name) for name in {kind: name for name, kind in kinds.items()}.values())

    def _distill(self, method: MethodPlan, names: list[str]) -> int:
        """Most bytes beside the weights of the blocks `names`, calibrated one after the other."""
        context, recipe = self._context, self._recipe(method.recipe)
        blocks = {name: self._block(name) for name in names}
        samples = [self._sample()] if recipe.needs_activations else []
        rows = torch.empty(num_conditioning_rows(context), conditioning_width(context), dtype=self._dtype, device=META)
        kept = 0

        def look(*_: int) -> None:
            nonlocal kept
            kept = max([kept, *(_bytes(_streams(sample)) for sample in samples)])

        def distill() -> None:
            for _distilled in distill_segment(
                context.model.calls, blocks, samples, bits={name: bits_inside(method, name) for name in names}, recipe=recipe,
                dense_blocks=method.attention.dense_blocks, conditioning_rows=rows, seed_of=lambda _: 0,
                fall_back=False, progress=look,
            ):  # fmt: skip
                pass

        weights = [tensor for block in blocks.values() for tensor in tensors_of(block)]
        inputs = [tensor for sample in samples for tensor in _held(sample)]
        peak = peak_on_meta(distill, holding=[*weights, *inputs, rows], on_gpu=self._on_gpu)
        corrected = method.recipe.sparse is not None and method.recipe.sparse.calibrate == "corrected"
        if self._on_gpu and corrected and samples:
            peak += _bytes(samples[0].reference.values())  # what the band misses of the attention
        return peak - _bytes(weights) + self._waiting(len(samples)) * kept

    def _repair(self, method: MethodPlan, name: str) -> int:
        reference, quantized = self._block(name), self._block(name)
        prefix = f"{name}."
        specs = planned_layers(self._context.model, method)
        inside = {k.removeprefix(prefix): spec for k, spec in specs.items() if k.startswith(prefix)}
        inside = {k: replace(spec, group=spec.group.removeprefix(prefix)) for k, spec in inside.items()}
        replace_linear_layers(quantized, inside)
        share_group_tensors(quantized)
        sample = RepairSample(self._sample())
        repair = partial(repair_block, self._context.model.calls[name], (reference, quantized), [sample])
        held = [*tensors_of(reference), *tensors_of(quantized), *_held(sample.stream)]
        peak = peak_on_meta(repair, holding=held)
        streams = _bytes([*_streams(sample.stream), *(sample.unrepaired or {}).values()])
        # The target is gone by then.
        return peak + self._waiting(1) * (streams + _bytes(sample.stream.reference.values()))

    def _waiting(self, num_here: int) -> int:
        """Samples that lie in the memory that counts while one is at work."""
        calls = self._context.config.selection.num_samples * len(self._context.branches)
        return 0 if self._on_gpu or not num_here else calls - num_here

    def _recipe(self, recipe: Recipe) -> Recipe:
        recipe = replace(recipe, epochs=min(1, recipe.epochs))
        if not self._on_gpu or recipe.sparse is None:
            return recipe
        return replace(recipe, attention=replace(recipe.sparse, calibrate="dense"))

    def _block(self, name: str) -> nn.Module:
        """Full precision's, on the meta device."""
        block = empty_block(self._context.model.config, self._context.model.family, name)
        return to_dtype(block, self._dtype).requires_grad_(False)

    def _sample(self) -> Sample:
        """The longest one, on the meta device."""
        streams = {name: torch.empty_like(stream) for name, stream in self._call.streams.items()}
        return Sample(streams, streams, self._call.constants)


def _streams(sample: Sample) -> list[Tensor]:
    """What a sample keeps from block to block, and in one."""
    trees = [sample.reference, sample.quantized, sample.target, sample.weights]
    if sample.attention is not None:
        trees += vars(sample.attention).values()
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def _held(sample: Sample) -> list[Tensor]:
    """What a sample brings along."""
    leaves = tree_leaves([sample.reference, dict(sample.constants.calls)])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of `tensors`."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
