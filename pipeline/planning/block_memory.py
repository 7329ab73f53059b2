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

from pipeline.context import RunContext
from pipeline.model_facts import ModelFacts
from pipeline.planning.meta_run import META, bytes_of, peak_on_meta, tensors_of, to_dtype
from pipeline.planning.model_size import planned_layers
from pipeline.planning.store_size import hidden_size
from pipeline.planning.token_counts import TokenCounts
from reelquant.calibration.block_distillation import Sample
from reelquant.calibration.drift_repair import RepairSample, repair_block
from reelquant.calibration.segment_distillation import distill_segment
from reelquant.quantization.linear import replace_linear_layers, share_group_tensors
from reelquant.settings.recipe import Recipe
from workers.distillation_worker import bits_inside
from workers.messages import MethodPlan


def block_kinds(model: ModelFacts, method: MethodPlan) -> dict[str, Hashable]:
    """Kind by name of the block: calibrating blocks of one kind takes as much, as they have layers of the same shapes and bits,
    and the same attention."""
    dense = method.recipe.sparse is None
    return {
        name: (
            model.family.group_levels(name),
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
        self._context, self._counts, self._dtype = context, counts, dtype
        self._family = context.model.family
        self._on_gpu = context.config.workers.num_gpus > 0
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
        num_rows = len(context.calibration_prompts) * context.config.generation.num_inference_steps
        rows = torch.empty(num_rows, hidden_size(context), dtype=self._dtype, device=META)
        kept = 0

        def look(*_: int) -> None:
            nonlocal kept
            kept = max([kept, *(_bytes(_streams(sample)) for sample in samples)])

        def distill() -> None:
            for _distilled in distill_segment(
                self._family, blocks, samples, bits={name: bits_inside(method, name) for name in names}, recipe=recipe,
                dense_blocks=method.attention.dense_blocks, conditioning_rows=rows, seed_of=lambda _: 0,
                fall_back=False, progress=look,
            ):  # fmt: skip
                pass

        weights = [tensor for block in blocks.values() for tensor in tensors_of(block)]
        inputs = [tensor for sample in samples for tensor in (sample.reference, *sample.conditioning.rotary)]
        peak = peak_on_meta(distill, holding=[*weights, *inputs, rows], on_gpu=self._on_gpu)
        corrected = method.recipe.sparse is not None and method.recipe.sparse.calibrate == "corrected"
        if self._on_gpu and corrected and samples:
            peak += samples[0].reference.nbytes  # what the band misses of the attention
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
        repair = partial(repair_block, self._family, name, (reference, quantized), [sample])
        held = [*tensors_of(reference), *tensors_of(quantized), *sample.stream.conditioning.rotary]
        peak = peak_on_meta(repair, holding=[*held, sample.stream.reference])
        streams = _bytes([*_streams(sample.stream), *([] if sample.unrepaired is None else [sample.unrepaired])])
        return peak + self._waiting(1) * (streams + sample.stream.reference.nbytes)  # the target is gone by then

    def _waiting(self, num_here: int) -> int:
        """Samples that lie in the memory that counts while one is at work."""
        return 0 if self._on_gpu or not num_here else self._context.config.selection.num_samples - num_here

    def _recipe(self, recipe: Recipe) -> Recipe:
        recipe = replace(recipe, epochs=min(1, recipe.epochs))
        if not self._on_gpu or recipe.sparse is None:
            return recipe
        return replace(recipe, attention=replace(recipe.sparse, calibrate="dense"))

    def _block(self, name: str) -> nn.Module:
        """Full precision's, on the meta device."""
        with META:
            block = self._family.build_block(self._context.model.config, name)
        return to_dtype(block, self._dtype).requires_grad_(False)

    def _sample(self) -> Sample:
        """The longest one, on the meta device."""
        model, layout = self._context.model, self._counts.layout
        length, width = self._counts.longest_stream, hidden_size(self._context)
        stream = torch.empty(length, width, dtype=self._dtype, device=META)
        table = torch.empty(layout.num_video, int(model.config["attention_head_dim"]), device=META)
        temb = torch.empty(1, width, dtype=self._dtype, device=META)
        layout = replace(layout, num_text=length - layout.num_video)
        return Sample(stream, stream, model.family.Conditioning(temb, (table, table), layout))


def _streams(sample: Sample) -> list[Tensor]:
    """What a sample keeps from block to block, and in one."""
    own = [sample.reference, sample.quantized, sample.target, sample.weights]
    if sample.attention is not None:
        own += vars(sample.attention).values()
    return [tensor for tensor in own if isinstance(tensor, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of `tensors`."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
