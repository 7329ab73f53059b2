"""Calibration of blocks: what is learned helps, what is stored computes the same, and every failure is named."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reelquant.calibration.attention_distillation import global_attention_loss
from reelquant.calibration.block_call import joined
from reelquant.calibration.block_distillation import (
    BlockDiverged,
    calibrated_copy,
    learn,
    mean_loss,
    prepare_targets,
    step_error,
    weighted_error,
)
from reelquant.calibration.sample import Sample
from reelquant.calibration.segment_distillation import DistilledBlock, distill_segment
from reelquant.checkpoint.layer_packing import pack_layer
from reelquant.quantization.linear import replace_linear_layers
from reelquant.settings.attention import SparseAttention
from reelquant.settings.generation import LayerBits
from reelquant.settings.recipe import Recipe
from tests.errors import raises
from tests.reelquant.narrow_blocks import (
    BLOCKS,
    bits_of,
    calls_of,
    config_of,
    constants_of,
    layout_of,
    new_block,
    streams_of,
)

NOTHING = Recipe()
S2Q = replace(
    NOTHING, channel_scale="learned", rotation="learned", clip="learned", rounding="gptq", token_weights=True, epochs=6
)
RECIPES = {
    "rtn": NOTHING,
    "smoothquant": replace(NOTHING, channel_scale="smoothquant"),
    "quarot": replace(NOTHING, rotation="hadamard"),
    "gptq": replace(NOTHING, rounding="gptq"),
    "s2q": S2Q,
    "s2q asymmetric": replace(S2Q, solve="asymmetric"),
    "s2q two-level": replace(S2Q, weight_layout="two_level"),
    "s2q, half of the tokens": replace(S2Q, tokens_per_step=0.5),
    "s2q with attention terms": replace(S2Q, attention_distillation="both", pool_size=8, num_salient_tokens=6),
}
SPARSE = SparseAttention(density=0.5, calibrate="sparse")
CONFIG = config_of()
CALLS = calls_of(CONFIG)
LAYOUT = layout_of(CONFIG, (4, 2, 8, 10), 5)


def outlier_blocks() -> dict[str, nn.Module]:
    """Two blocks whose weights have a few strong input channels, as real models have."""
    torch.manual_seed(0)
    blocks = {}
    for name in BLOCKS:
        block = new_block(CONFIG, name)
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight.data[:, ::13] *= 4
        blocks[name] = block
    return blocks


def make_samples(num: int = 4) -> tuple[list[Sample], Tensor]:
    """Streams with outlier channels, and what the modulation layers read."""
    generator = torch.Generator().manual_seed(1)
    channels = 1 + 6 * (torch.rand(32, generator=generator) > 0.9)
    rows = torch.randn(num, 32, generator=generator)
    samples = []
    for row in rows:
        streams = streams_of(torch.randn(LAYOUT.num_tokens, 32, generator=generator) * channels, LAYOUT)
        samples.append(Sample(streams, streams, constants_of(CONFIG, LAYOUT, row.unsqueeze(0))))
    return samples, nn.functional.silu(rows)


def run(
    recipe: Recipe,
    *,
    fall_back: bool = False,
    blocks: dict[str, nn.Module] | None = None,
    dense_blocks: tuple[str, ...] = (),
) -> list[DistilledBlock]:
    samples, rows = make_samples()
    blocks = blocks or outlier_blocks()
    return list(
        distill_segment(
            CALLS, blocks, samples, bits={name: bits_of(name) for name in blocks}, recipe=recipe,
            dense_blocks=dense_blocks, conditioning_rows=rows, seed_of=lambda name: len(name), fall_back=fall_back,
            progress=lambda *_: None,
        )
    )  # fmt: skip


@functools.cache
def known(recipe: Recipe) -> list[DistilledBlock]:
    """`run(recipe)`, made once. Read only."""
    return run(recipe)


def stored_block(reference: nn.Module, distilled: DistilledBlock) -> nn.Module:
    """The block as the checkpoint runs it: quantized linears filled from packed tensors."""
    block, specs, tensors = copy.deepcopy(reference), {}, {}
    for name, layer in distilled.layers.items():
        leader = distilled.layers[layer.leader]
        packed, specs[name] = pack_layer(
            name, codes=layer.codes, grid=layer.grid, bias=layer.bias, activation_bits=layer.activation_bits,
            group=layer.leader, group_has_channel_scale=leader.channel_scale is not None,
            group_rotation=0 if leader.rotation is None else len(leader.rotation),
            channel_scale=layer.channel_scale, rotation=layer.rotation, activation_clip=layer.activation_clip,
        )  # fmt: skip
        tensors.update(packed)
    replace_linear_layers(block, specs)
    block.load_state_dict(tensors, strict=False, assign=True)
    return block


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_stored_block_computes_what_was_calibrated(recipe: Recipe) -> None:
    references = outlier_blocks()
    samples, _ = make_samples()
    distilled = known(recipe)
    for sample in samples[:2]:
        for block in distilled:
            assert set(block.layers) == set(bits_of(block.name))
        streams = sample.reference
        for block in distilled:
            stored = stored_block(references[block.name], block)
            with torch.no_grad():
                call, entry = CALLS[block.name], streams
                streams = call(references[block.name], entry, sample.constants)
                out = call(stored, entry, sample.constants)
            target, found = joined(streams), joined(out)
            sqnr = 10 * math.log10(float(target.square().sum() / (target - found).square().sum()))
            assert 8 < sqnr < 80, f"{block.name}: {sqnr:.1f} dB"
    if recipe.needs_activations:
        # The worker's own loss after rounding is that of the stored block on the calibration samples.
        fresh, _ = make_samples()
        prepare_targets(CALLS[BLOCKS[0]], references[BLOCKS[0]], fresh, recipe)
        stored_loss = mean_loss(CALLS[BLOCKS[0]], stored_block(references[BLOCKS[0]], distilled[0]), fresh)
        assert stored_loss == pytest.approx(distilled[0].result.loss_after, rel=2e-2)


def test_learning_lowers_the_loss_and_rounding_keeps_it() -> None:
    learned, plain = known(S2Q), known(RECIPES["gptq"])
    for ours in learned:
        assert ours.result.loss_before is not None
        assert ours.result.losses[-1] < 0.9 * ours.result.loss_before, ours.result
        assert len(ours.result.losses) == S2Q.epochs
    after = [run[0].result.loss_after for run in (learned, plain)]
    assert after[0] is not None
    assert after[1] is not None
    assert after[0] < 0.8 * after[1], after


@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_a_part_of_the_tokens_teaches_almost_as_much(fraction: float) -> None:
    """The losses before and after are those of all tokens; of 40 video tokens a step sees 20 and 10."""
    part = replace(S2Q, tokens_per_step=fraction)
    for ours, whole, plain in zip(known(part), known(S2Q), known(RECIPES["gptq"]), strict=True):
        if ours.name == BLOCKS[0]:  # the next one's input is the learned one's output
            assert ours.result.loss_before == whole.result.loss_before
        assert ours.result.losses != whole.result.losses
        after = [block.result.loss_after or math.nan for block in (ours, whole, plain)]
        assert after[0] < 0.6 * after[2], after  # 0.25 to 0.35
        assert after[0] < 1.5 * after[1], after  # 0.97 to 1.25


def test_the_error_of_a_step_is_that_of_all_tokens_in_the_mean() -> None:
    for name in BLOCKS:
        samples, _ = make_samples(1)
        reference = outlier_blocks()[name].requires_grad_(False)
        call = CALLS[name]
        prepare_targets(call, reference, samples, S2Q)
        block, _ = calibrated_copy(reference, call.levels, bits=bits_of(name), recipe=S2Q, activation_amax={})
        sample = samples[0].at(block)
        with torch.no_grad():
            exact = weighted_error(call(block, sample.quantized, sample.constants), sample)
            assert torch.equal(step_error(call, block, sample, S2Q, seed=3), exact), "all tokens: today's bits"
            quarter = replace(S2Q, tokens_per_step=0.25)
            errors = [step_error(call, block, sample, quarter, seed=seed) for seed in range(300)]
        estimates = torch.stack(errors).double()
        spread = float(estimates.std())
        assert 0.02 < spread / float(exact) < 0.5
        assert abs(float(estimates.mean() - exact)) < 4 * spread / len(errors) ** 0.5


@pytest.mark.parametrize("terms", ["none", "both"])
def test_which_tokens_a_step_sees_is_decided_by_the_seed(terms: str) -> None:
    recipe = replace(S2Q, tokens_per_step=0.3, attention_distillation=terms, pool_size=8, num_salient_tokens=6)  # type: ignore[arg-type]
    for first, second in zip(run(recipe), run(recipe), strict=True):
        assert first.result.losses == second.result.losses
        assert first.result.attention_losses == second.result.attention_losses
        assert bool(first.result.attention_losses) == (terms == "both")
        for name, layer in first.layers.items():
            assert torch.equal(layer.codes, second.layers[name].codes), name


def test_two_calibrations_give_the_same_integers() -> None:
    for first, second in zip(known(S2Q), run(S2Q), strict=True):
        for name, layer in first.layers.items():
            assert torch.equal(layer.codes, second.layers[name].codes), name
            assert torch.equal(layer.grid.scale, second.layers[name].grid.scale), name


def test_the_quantized_stream_reaches_the_next_block() -> None:
    """Inside a segment the second block sees the first one's error; alone it does not, and comes out otherwise."""
    together = known(RECIPES["gptq"])[1]
    alone = run(RECIPES["gptq"], blocks={BLOCKS[1]: outlier_blocks()[BLOCKS[1]]})[0]
    same = [torch.equal(layer.codes, alone.layers[name].codes) for name, layer in together.layers.items()]
    assert not all(same)


def test_a_block_that_diverges_stops_with_its_name_and_step_or_falls_back() -> None:
    """A real divergence: steps so long that the channel scales overflow."""
    recipe = replace(S2Q, learning_rate_transform=1e4)
    with raises(BlockDiverged, "transformer_blocks.0", "distillation.on_failure", "method.learning_rate_*"):
        run(recipe)
    for block in run(recipe, fall_back=True):
        assert "diverged" in str(block.result.fell_back)
        assert block.result.losses == []
        assert math.isfinite(block.result.loss_after or math.nan)


def test_token_weights_are_those_of_the_full_precision_attention() -> None:
    samples, _ = make_samples(1)
    prepare_targets(CALLS[BLOCKS[0]], outlier_blocks()[BLOCKS[0]], samples, S2Q)
    weights = samples[0].weights
    assert weights is not None
    assert weights.shape == (LAYOUT.num_tokens,)
    assert float(weights.min()) == pytest.approx(0.5)
    assert float(weights.max()) == pytest.approx(1.0)
    prepare_targets(CALLS[BLOCKS[0]], outlier_blocks()[BLOCKS[0]], samples, NOTHING)


@pytest.mark.parametrize("terms", ["global", "local", "both"])
def test_attention_terms_start_as_large_as_the_error_and_fall(terms: str) -> None:
    recipe = replace(S2Q, attention_distillation=terms, pool_size=8, num_salient_tokens=6, epochs=24)  # type: ignore[arg-type]
    for block in run(recipe):
        history = block.result.attention_losses
        assert set(history) == ({"global", "local"} if terms == "both" else {terms})
        for values in history.values():
            assert len(values) == recipe.epochs
            assert 0.1 < values[0] / block.result.losses[0] < 10
            # So small a block jumps from epoch to epoch, another way on every kind of CPU.
            assert min(values) < 0.85 * values[0], values


def test_attention_terms_bring_the_attention_nearer() -> None:
    """On the block itself, by the loss of the distillation: unweighted, on the stored block."""

    def shift(recipe: Recipe) -> float:
        distilled = run(recipe, blocks={BLOCKS[0]: outlier_blocks()[BLOCKS[0]]})[0]
        block, reference = stored_block(outlier_blocks()[BLOCKS[0]], distilled), outlier_blocks()[BLOCKS[0]]
        found: list[tuple[Tensor, Tensor]] = []
        total = 0.0
        for sample in make_samples()[0]:
            for module in (reference, block):
                with torch.no_grad(), CALLS[BLOCKS[0]].watch_attention(module, lambda q, k, _v: found.append((q, k))):
                    CALLS[BLOCKS[0]](module, sample.reference, sample.constants)
            total += float(global_attention_loss(*found[-2], *found[-1], 1))
        return total

    strong = replace(S2Q, attention_distillation="both", pool_size=4, num_salient_tokens=16, epochs=10)
    assert shift(strong) < shift(replace(S2Q, epochs=10))


def test_auto_weights_can_be_replaced_by_fixed_ones() -> None:
    auto = replace(S2Q, attention_distillation="both", pool_size=8, num_salient_tokens=6)
    fixed = replace(auto, lambda_global=1e-9, lambda_local=1e-9)
    plain, almost, ours = known(S2Q), run(fixed), known(auto)
    assert almost[0].result.losses == pytest.approx(plain[0].result.losses, rel=1e-3)
    assert ours[0].result.losses != pytest.approx(plain[0].result.losses, rel=1e-3)


@pytest.mark.parametrize("attention", ["sparse", "corrected", "dense"])
def test_a_block_is_calibrated_with_the_attention_it_will_run_with(attention: str) -> None:
    recipe = replace(S2Q, attention=replace(SPARSE, calibrate=attention), epochs=2)  # type: ignore[arg-type]
    references = outlier_blocks()
    for block in run(recipe, blocks=copy.deepcopy(references)):
        assert block.result.head_kinds is not None
        assert set(block.result.head_kinds) <= {"s", "t"}
        assert len(block.result.head_kinds) == 2
        assert block.result.band_errors is not None
        chosen = ["st"[errors[1] < errors[0]] for errors in block.result.band_errors]
        assert "".join(chosen) == block.result.head_kinds
    # The loss before learning is that of the attention under test: dense, missing what the band misses, or corrected.
    before = {}
    for kind in ("sparse", "corrected", "dense"):
        one = replace(RECIPES["gptq"], attention=replace(SPARSE, calibrate=kind))
        before[kind] = run(one, blocks={BLOCKS[0]: references[BLOCKS[0]]})[0].result.loss_before or math.nan
    assert before["dense"] < before["corrected"] < before["sparse"], before


def test_dense_blocks_of_a_sparse_method_are_calibrated_dense() -> None:
    first, second = run(replace(RECIPES["gptq"], attention=SPARSE), dense_blocks=BLOCKS[:1])
    assert first.result.loss_before == known(RECIPES["gptq"])[0].result.loss_before
    assert second.result.loss_before != known(RECIPES["gptq"])[1].result.loss_before


def test_layers_of_one_group_need_the_same_activation_bits() -> None:
    name = BLOCKS[0]
    bits = {**bits_of(name), "attn.to_k": LayerBits(4, 8)}
    with raises(ValueError, "attn.to_q", "attn.to_k", 6, 8):
        calibrated_copy(outlier_blocks()[name], CALLS[name].levels, bits=bits, recipe=NOTHING, activation_amax={})


def test_only_what_is_to_be_learned_changes() -> None:
    recipe = replace(S2Q, rotation="hadamard", clip="none", epochs=2)
    samples, _ = make_samples()
    reference = outlier_blocks()[BLOCKS[0]].requires_grad_(False)
    call = CALLS[BLOCKS[0]]
    prepare_targets(call, reference, samples, recipe)
    block, groups = calibrated_copy(reference, call.levels, bits=bits_of(call.name), recipe=recipe, activation_amax={})
    learn(call, block, groups=groups, samples=samples, recipe=recipe, seed=0, progress=lambda *_: None)
    for group in (group for level in groups for group in level):
        if group.transform.skew is not None:
            assert not bool(group.transform.skew.any())
        if group.transform.log_scale is not None:
            assert bool(group.transform.log_scale.any())
        assert group.transform.clip() == 1.0
