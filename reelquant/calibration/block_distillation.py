"""Block-wise distillation (both papers, §5 of the method): one block, its samples, and what is learned of it.

The quantized block is given the input that the quantized blocks before it produce, and learns to give the output that the
full-precision block gives for the full-precision input: loss `1/L sum_j lambda_j ||block_FP(x_j) - block_q(x_j)||^2`. A step
may estimate it from a random part of the tokens; what is compared before and after learning is always that of all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.attention.column_sums import attention_column_sums
from reelquant.calibration.attention_distillation import attention_targets, salient_tokens
from reelquant.calibration.attention_terms import AttentionTerms
from reelquant.calibration.block_call import BlockCall, Streams, by_token, joined_rows
from reelquant.calibration.calibrated_layers import CalibratedGroup, CalibratedLinear, GroupTransform
from reelquant.calibration.host_memory import moved, moved_all
from reelquant.calibration.sample import Sample, SampleView
from reelquant.calibration.saved_tensors import saved_tensors
from reelquant.calibration.sparse_block import sample_band_errors
from reelquant.calibration.token_rows import TokenRows, token_rows
from reelquant.calibration.token_weights import token_weights
from reelquant.families.family import Levels
from reelquant.quantization.smoothing import smoothing_scale
from reelquant.settings.generation import LayerBits
from reelquant.settings.recipe import Recipe


class BlockDiverged(RuntimeError):
    """The loss of a block became NaN or infinite."""

    def __init__(self, block: str, step: int, loss: float) -> None:
        super().__init__(
            f"distillation of {block} diverged: loss {loss} at step {step}. Ways out: distillation.on_failure: gptq "
            "(this block is then rounded without learning, and the report says so), smaller method.learning_rate_*, "
            "or more activation bits for its layers"
        )
        self.block, self.step, self.loss = block, step, loss

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockDiverged, (self.block, self.step, self.loss)


@dataclass
class BlockResult:
    """What is reported of one block."""

    losses: list[float] = field(default_factory=list)
    """Mean loss of every epoch; an estimate where a step sees a part of the tokens (`Recipe.tokens_per_step`)."""
    loss_before: float | None = None
    """With the transform's start values, before learning."""
    loss_after: float | None = None
    """After rounding."""
    layer_sqnr_db: dict[str, float] = field(default_factory=dict)
    fell_back: str | None = None
    """Why the block was rounded without learning, if it was."""
    attention_losses: dict[str, list[float]] = field(default_factory=dict)
    """Attention terms of the loss, weighted: mean of every epoch by `global` and `local`."""
    head_kinds: str | None = None
    """One letter a head, for sparse attention."""
    band_errors: list[list[float]] | None = None
    """`[H][2]`: relative error of each head under a spatial and a temporal band, mean over the samples."""


def prepare_targets(call: BlockCall, block: nn.Module, samples: Sequence[Sample], recipe: Recipe) -> Tensor | None:
    """Runs the full-precision block on every sample: fills `target`, and `weights` and `attention` where the recipe has them.

    Returns: for sparse attention float32 `[H, 2]`, the mean `band_errors` of the samples.
    """
    errors: list[Tensor] = []
    for sample in samples:
        here = sample.at(block)

        def observe(q: Tensor, k: Tensor, v: Tensor, *, here: SampleView = here, sample: Sample = sample) -> None:
            home = sample.home
            terms = recipe.attention_distillation if recipe.distills_attention else "none"
            local = terms in ("local", "both")
            sums = attention_column_sums(q, k) if local or recipe.token_weights else None
            if sums is not None and recipe.token_weights:
                sample.weights = moved(token_weights(sums, recipe.lambda_min, 1.0), home)
            if recipe.distills_attention:
                sample.attention = attention_targets(
                    q,
                    k,
                    stride=recipe.pool_size if terms in ("global", "both") else None,
                    indices=salient_tokens(sums, recipe.num_salient_tokens) if local and sums is not None else None,
                ).to(home)
            if recipe.sparse is not None:
                errors.append(sample_band_errors(here.constants.layout, recipe.sparse.density, (q, k, v)))

        observed = recipe.sparse is not None or (recipe.needs_activations and recipe.token_weights)
        watching = call.watch_attention(block, observe) if observed or recipe.distills_attention else nullcontext()
        with torch.no_grad(), watching:
            sample.target = moved_all(call(block, here.reference, here.constants), sample.home)
    return torch.stack(errors).mean(dim=0) if errors else None


def calibrated_copy(
    block: nn.Module,
    levels: Levels,
    *,
    bits: Mapping[str, LayerBits],
    recipe: Recipe,
    activation_amax: Mapping[str, Tensor],
) -> tuple[nn.Module, list[list[CalibratedGroup]]]:
    """A copy of `block` whose linears are `CalibratedLinear`s.

    Args:
        levels: of the block's call.
        bits: bits by layer name inside the block; a layer without an entry stays as it is.
        activation_amax: by group name `[d]`, the largest input magnitude of each channel; read for SmoothQuant's scale.
    """
    block = copy.deepcopy(block).requires_grad_(False)
    calibrated: list[list[CalibratedGroup]] = []
    for level in levels:
        groups = []
        for group in level:
            names = [name for name in group.layers if name in bits]
            if not names:
                continue
            linears = {name: _linear(block, name) for name in names}
            activation_bits = {bits[name].activation for name in names}
            if len(activation_bits) > 1:
                raise ValueError(f"layers {names} read one tensor and must have the same activation bits: {bits}")
            first = linears[names[0]]
            initial = None
            if group.name in activation_amax:
                weight_amax = torch.stack([linear.weight.abs().amax(dim=0) for linear in linears.values()]).amax(dim=0)
                initial = smoothing_scale(activation_amax[group.name], weight_amax.float(), recipe.smoothing_alpha)
            transform = GroupTransform(first.in_features, activation_bits.pop(), recipe, initial_scale=initial).to(
                first.weight.device
            )
            layers = {}
            for name, linear in linears.items():
                layers[name] = CalibratedLinear(linear, transform, bits[name], recipe)
                block.set_submodule(name, layers[name])
            groups.append(CalibratedGroup(group.name, group.stream, transform, layers))
        calibrated.append(groups)
    block.register_forward_pre_hook(_forget_inputs)
    return block, calibrated


def _forget_inputs(block: nn.Module, *_: object) -> None:
    """Before every call: a constant, such as the text's states, is the same tensor in all, while what is learned changes."""
    for module in block.modules():
        if isinstance(module, GroupTransform):
            module.forget()


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}"
    return linear


def weighted_error(output: Streams, sample: SampleView) -> Tensor:
    """`1/L sum_j lambda_j ||target_j - output_j||^2`, float32 (S²Q-VDiT eq. 12)."""
    error = by_token(_token_error, output, sample.target)
    return (error if sample.weights is None else error * sample.weights).mean()


def estimated_error(output: Tensor, sample: SampleView, rows: TokenRows) -> Tensor:
    """The estimate of `weighted_error` from the output `[R, d]` at `rows`."""
    error = _token_error(output, joined_rows(sample.target, rows.indices))
    return rows.mean(error if sample.weights is None else error * sample.weights.index_select(0, rows.indices))


def _token_error(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().sum(dim=-1)


def step_error(call: BlockCall, block: nn.Module, sample: SampleView, recipe: Recipe, *, seed: int) -> Tensor:
    """The error of one step: of all tokens, or of the share that `recipe` has a step see, drawn by `seed`."""
    rows = token_rows(sample.constants.layout, recipe.tokens_per_step, seed=seed)
    if rows is None:
        return weighted_error(call(block, sample.quantized, sample.constants), sample)
    rows = rows.to(next(block.parameters()).device)
    _forget_inputs(block)
    return estimated_error(call.rows(block, sample.quantized, sample.constants, rows.indices), sample, rows)


def mean_loss(call: BlockCall, block: nn.Module, samples: Sequence[Sample]) -> float:
    """Mean of the block loss over the samples, without gradients."""
    with torch.no_grad():
        here = (sample.at(block) for sample in samples)
        losses = [weighted_error(call(block, s.quantized, s.constants), s) for s in here]
    return float(torch.stack(losses).mean())


def learn(
    call: BlockCall,
    block: nn.Module,
    *,
    groups: Sequence[Sequence[CalibratedGroup]],
    samples: Sequence[Sample],
    recipe: Recipe,
    seed: int,
    progress: Callable[[int, int], None],
    lean: bool = False,
) -> tuple[list[float], dict[str, list[float]]]:
    """Learns channel scales, rotations and clips of `block` in place.

    Args:
        seed: of the order of the samples, and with the number of the step of the tokens that it sees.
        lean: keep what a step saves for its backward pass elsewhere (`saved_tensors`); the result is the same.

    Returns: the mean block error of every epoch, and by name the mean weighted attention terms.

    Raises:
        BlockDiverged: the loss is not finite.
    """
    optimizer = _optimizer(groups, recipe)
    total = recipe.epochs * len(samples)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    order = torch.Generator().manual_seed(seed)
    terms = AttentionTerms(call, block, recipe)
    losses: list[float] = []
    for epoch in range(recipe.epochs):
        epoch_losses = []
        for position, index in enumerate(torch.randperm(len(samples), generator=order).tolist()):
            step = epoch * len(samples) + position
            sample = samples[index].at(block)
            with saved_tensors(elsewhere=lean), terms.watching():
                error = step_error(call, block, sample, recipe, seed=seed + step)
            loss = error if sample.attention is None else error + terms.weighted(sample.attention, error)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise BlockDiverged(call.name, step, value)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            epoch_losses.append(float(error.detach()))
            progress(step + 1, total)
        losses.append(sum(epoch_losses) / len(epoch_losses))
        terms.end_epoch()
    return losses, terms.history


def without_learning(recipe: Recipe) -> Recipe:
    """The same recipe with nothing learned: fixed Hadamard rotation, no clip; for blocks that diverged."""
    return replace(
        recipe,
        epochs=0,
        channel_scale="none",
        rotation="none" if recipe.rotation == "none" else "hadamard",
        clip="none",
        attention_distillation="none",
        tokens_per_step=1.0,
    )


def _optimizer(groups: Sequence[Sequence[CalibratedGroup]], recipe: Recipe) -> torch.optim.AdamW:
    transforms: list[nn.Parameter] = []
    clips: list[nn.Parameter] = []
    for group in (group for level in groups for group in level):
        transforms += [p for p in (group.transform.log_scale, group.transform.skew) if p is not None]
        clips += [p for p in (group.transform.clip_logit,) if p is not None]
        clips += [layer.clip_logit for layer in group.layers.values() if layer.clip_logit is not None]
    return torch.optim.AdamW(
        [
            {"params": [p for p in transforms if p.requires_grad], "lr": recipe.learning_rate_transform},
            {"params": [p for p in clips if p.requires_grad], "lr": recipe.learning_rate_clip},
        ],
        weight_decay=0.0,
    )
