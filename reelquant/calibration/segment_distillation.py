"""Segment-parallel distillation (method §5): walks the blocks of one segment with the streams of both models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reelquant.attention.head_kind import kinds_of
from reelquant.calibration.block_call import BlockCall
from reelquant.calibration.block_distillation import (
    BlockDiverged,
    BlockResult,
    calibrated_copy,
    learn,
    mean_loss,
    prepare_targets,
    without_learning,
)
from reelquant.calibration.block_rounding import RoundedLayer, group_inputs, layer_sqnr, round_block
from reelquant.calibration.host_memory import moved_all
from reelquant.calibration.sample import Sample
from reelquant.calibration.sparse_block import CalibrationCore, drop_missed_attention, keep_missed_attention
from reelquant.families.attention_core import plain_core
from reelquant.settings.generation import LayerBits
from reelquant.settings.recipe import Recipe


@dataclass(frozen=True)
class DistilledBlock:
    """A rounded block and what is reported of it."""

    name: str
    layers: Mapping[str, RoundedLayer]
    result: BlockResult


def distill_segment(
    calls: Mapping[str, BlockCall],
    blocks: Mapping[str, nn.Module],
    samples: Sequence[Sample],
    *,
    bits: Mapping[str, Mapping[str, LayerBits]],
    recipe: Recipe,
    dense_blocks: tuple[str, ...] = (),
    conditioning_rows: Tensor,
    seed_of: Callable[[str], int],
    fall_back: bool,
    progress: Callable[[int, int], None],
    lean: bool = False,
) -> Iterator[DistilledBlock]:
    """Calibrates the consecutive `blocks` of a segment one after the other.

    Args:
        calls: of the blocks by name (`input_groups.block_calls`).
        blocks: full-precision blocks by name, in model order.
        samples: the segment's entry: `reference` and `quantized` both are the stored streams. Consumed: they are advanced block
            by block. They stay on the device on which they are given: host memory holds more.
        bits: by block, then by layer inside the block.
        dense_blocks: names of blocks whose attention stays dense.
        conditioning_rows: `[M, d]`, what the modulation layers read at all candidates.
        fall_back: round a block that diverges without learning instead of raising.
        progress: called with steps done and steps in all.
        lean: take less memory and more time (`saved_tensors`); the result is the same.

    Raises:
        BlockDiverged: a block's loss is not finite and `fall_back` is off.
    """
    steps = max(1, recipe.epochs * len(samples) if recipe.learns else 1)
    for sample in samples:
        sample.lock_pages()
    for index, (name, reference) in enumerate(blocks.items()):

        def advance(done: int, total: int, index: int = index) -> None:
            progress(index * steps + done * steps // total, len(blocks) * steps)

        call = calls[name]
        reference.requires_grad_(False)
        errors = prepare_targets(call, reference, samples, recipe)
        core = None
        if errors is not None and name not in dense_blocks:
            core = _calibration_core(call, reference, samples, recipe=recipe, errors=errors)
        quantized, distilled = _distill_block(
            call, reference, samples, bits=bits[name], recipe=recipe, rows=conditioning_rows, seed=seed_of(name),
            fall_back=fall_back, progress=advance, core=core, lean=lean,
        )  # fmt: skip
        if errors is not None:
            distilled.result.head_kinds = kinds_of(errors)
            distilled.result.band_errors = errors.tolist()
        for sample in samples:
            here = sample.at(quantized)
            with torch.no_grad():
                sample.quantized = moved_all(call(quantized, here.quantized, here.constants), sample.home)
            assert sample.target is not None
            sample.reference = sample.target
        drop_missed_attention(samples)
        advance(1, 1)
        yield distilled


def _distill_block(
    call: BlockCall,
    reference: nn.Module,
    samples: Sequence[Sample],
    *,
    bits: Mapping[str, LayerBits],
    recipe: Recipe,
    rows: Tensor,
    seed: int,
    fall_back: bool,
    progress: Callable[[int, int], None],
    core: CalibrationCore | None,
    lean: bool,
) -> tuple[nn.Module, DistilledBlock]:
    levels = call.levels
    amax = _activation_amax(call, reference, samples) if recipe.channel_scale == "smoothquant" else {}
    block, groups = calibrated_copy(reference, levels, bits=bits, recipe=recipe, activation_amax=amax)
    _set_core(call, block, core)
    result = BlockResult()
    if recipe.needs_activations:
        result.loss_before = mean_loss(call, block, samples)
    if recipe.learns:
        try:
            result.losses, result.attention_losses = learn(
                call,
                block,
                groups=groups,
                samples=samples,
                recipe=recipe,
                seed=seed,
                progress=progress,
                lean=lean,
            )
        except BlockDiverged as error:
            if not fall_back:
                raise
            recipe = without_learning(replace(recipe, rounding="gptq"))
            block, groups = calibrated_copy(reference, levels, bits=bits, recipe=recipe, activation_amax={})
            _set_core(call, block, core)
            result.fell_back = str(error)
    layers = round_block(call, reference, block, groups=groups, samples=samples, conditioning_rows=rows, recipe=recipe)
    if recipe.needs_activations:
        result.loss_after = mean_loss(call, block, samples)
        result.layer_sqnr_db = layer_sqnr(call, reference, block, list(layers), samples)
    return block, DistilledBlock(call.name, layers, result)


def _calibration_core(
    call: BlockCall, reference: nn.Module, samples: Sequence[Sample], *, recipe: Recipe, errors: Tensor
) -> CalibrationCore | None:
    """Attention of the block under calibration, None where it is the model's own; the samples get what it needs."""
    sparse = recipe.sparse
    if sparse is None or sparse.calibrate == "dense":
        return None
    kinds = kinds_of(errors)
    if sparse.calibrate == "corrected":
        keep_missed_attention(call, reference, samples, kinds=kinds, density=sparse.density)
    return CalibrationCore(kinds, sparse.density)


def _set_core(call: BlockCall, block: nn.Module, core: CalibrationCore | None) -> None:
    """Dense blocks too: with a core of ours, layers that read one tensor share its transform."""
    call.set_core(block, core or plain_core)


def _activation_amax(call: BlockCall, block: nn.Module, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Largest input magnitude per channel `[d]` of every group that reads tokens, over all samples."""
    amax: dict[str, Tensor] = {}
    for level in call.levels:
        leaders = [group.name for group in level if group.stream != "conditioning"]
        for sample in (stored.at(block) for stored in samples) if leaders else ():
            seen = group_inputs(call, block, leaders, sample.reference, sample.constants)
            for leader in leaders:
                found = nn.functional.pad(seen[leader].float().abs(), (0, 0, 0, 1)).amax(dim=0)  # there may be no row
                amax[leader] = torch.maximum(amax[leader], found) if leader in amax else found
    return amax
