"""Sparse attention inside a real pipeline: whose state is whose, and what a sparse generation computes."""

from __future__ import annotations

import copy
import functools
import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import reelquant  # noqa: F401
from reelquant.attention.residual_cache import ResidualCache
from reelquant.attention.sparse_spec import SparseAttentionSpec, dense_threshold, refresh_thresholds
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.families import hunyuan_video_attention
from reelquant.families.hunyuan_video import FAMILY
from reelquant.runtime import sparse_attention
from reelquant.runtime.attach import attach_runtime
from reelquant.runtime.generation import GenerationTracker
from reelquant.runtime.pipeline_schedule import PipelineSchedule
from reelquant.runtime.sparse_attention import AttentionPrecision, SparseAttention, Visited
from reelquant.settings.attention import Residual
from reelquant.tokens import TokenLayout
from tests.errors import raises
from tests.reelquant.narrow_blocks import layout_of

MODEL = Path(__file__).parents[3] / "assets" / "hunyuanvideo-digits"
SHAPE = {"height": 32, "width": 48, "num_frames": 9}
PROMPTS = ["the digit 3 moving left and the digit 7 moving down", "the digit 5 moving right"]
BLOCKS = tuple([f"transformer_blocks.{i}" for i in range(3)] + [f"single_transformer_blocks.{i}" for i in range(6)])
LEVELS = PipelineSchedule(MODEL, FAMILY)
SPEC = SparseAttentionSpec(
    density=0.3, head_kinds=dict.fromkeys(BLOCKS, "sts"), interval=3, residual=Residual(order=2, rank=8)
)


@functools.cache
def opened() -> Any:
    return DiffusionPipeline.from_pretrained(str(MODEL), dtype=torch.float32, local_files_only=True)


def open_pipeline(spec: SparseAttentionSpec | None) -> Any:
    """A pipeline with a transformer and a scheduler of its own."""
    own = {name: copy.deepcopy(getattr(opened(), name)) for name in ("transformer", "scheduler")}
    pipeline: Any = type(opened())(**{**opened().components, **own})
    pipeline.set_progress_bar_config(disable=True)
    if spec is not None:
        pipeline.tracker = attach_runtime(
            pipeline.transformer, QuantizationSpec(bits="W16A16", method="none", layers={}, sparse_attention=spec)
        )
    return pipeline


@pytest.fixture(scope="module")
def dense() -> Any:
    return open_pipeline(None)


@pytest.fixture(scope="module")
def sparse() -> Any:
    return open_pipeline(SPEC)


def noise(seed: int, num: int = 1, shape: dict[str, int] | None = None) -> Tensor:
    shape = shape or SHAPE
    size = (num, 8, (shape["num_frames"] - 1) // 4 + 1, shape["height"] // 4, shape["width"] // 4)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def latents(pipeline: Any, prompt: Any, seed: int = 0, *, num: int = 1, steps: int = 5, **options: Any) -> Tensor:
    shape = options.pop("shape", SHAPE)
    start = options.pop("latents", None)
    start = noise(seed, num, shape) if start is None else start
    out: Tensor = pipeline(
        prompt,
        **shape,
        num_inference_steps=steps,
        max_sequence_length=32,
        latents=start,
        output_type="latent",
        **options,
    ).frames
    return out


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def plain(dense: Any) -> Tensor:
    return latents(dense, PROMPTS[0])


@pytest.fixture(scope="module")
def expected(sparse: Any) -> Tensor:
    return latents(sparse, PROMPTS[0])


def test_dense_from_end_to_end_is_the_model_itself(plain: Tensor) -> None:
    always = open_pipeline(replace(SPEC, interval=1))
    whole = open_pipeline(replace(SPEC, density=1.0, residual=Residual(order=0)))
    assert error(latents(always, PROMPTS[0]), plain) < 1e-4
    assert error(latents(whole, PROMPTS[0]), plain) < 1e-4


def test_one_line_turns_it_dense_and_back(plain: Tensor, sparse: Any, expected: Tensor) -> None:
    sparse.transformer.sparse_attention.enabled = False
    try:
        assert error(latents(sparse, PROMPTS[0]), plain) < 1e-4
    finally:
        sparse.transformer.sparse_attention.enabled = True
    assert torch.equal(latents(sparse, PROMPTS[0]), expected)


def test_it_is_sparse_and_near(plain: Tensor, expected: Tensor) -> None:
    naive = latents(open_pipeline(replace(SPEC, residual=Residual(order=0))), PROMPTS[0])
    assert 1e-3 < error(expected, plain) < error(naive, plain)


def test_attention_in_8_bits_is_near_and_off_by_default(sparse: Any, expected: Tensor) -> None:
    attention = sparse.transformer.sparse_attention
    assert attention.precision == AttentionPrecision("full", "full")
    try:
        for sparse_side, dense_side, largest in (
            ("int8_16", "int8_16", 5e-2),  # measured: 3.5e-2
            ("int8_fp8", "full", 8e-2),  # measured: 5.9e-2
            ("full", "int8_fp8", 0.11),  # measured: 8.3e-2
        ):
            attention.precision = AttentionPrecision(sparse_side, dense_side)  # type: ignore[arg-type]
            found = latents(sparse, PROMPTS[0])
            assert 0 < error(found, expected) < largest
            if sparse_side == dense_side:
                stored = open_pipeline(replace(SPEC, precision=sparse_side))  # type: ignore[arg-type]
                assert torch.equal(latents(stored, PROMPTS[0]), found)
    finally:
        attention.precision = AttentionPrecision()
    assert torch.equal(latents(sparse, PROMPTS[0]), expected)


def test_the_pairs_that_ran_are_those_of_the_specification(sparse: Any) -> None:
    attention = sparse.transformer.sparse_attention
    attention.visited = Visited()
    latents(sparse, PROMPTS[0], steps=7)
    config = sparse.transformer.config
    tokens = len(sparse.encode_prompt(PROMPTS[0], max_sequence_length=32)[2].nonzero())
    layout = layout_of(config, tuple(noise(0).shape[1:]), tokens)
    from reelquant.tokens import band_width

    width = band_width(layout, SPEC.density)
    stated = SPEC.effective_density(layout, width, noise_levels=LEVELS(7), blocks=BLOCKS)
    assert attention.visited.density == pytest.approx(stated, rel=1e-12)
    assert stated == pytest.approx((3 + 4 * 0.3) / 7, abs=0.01)


def test_a_block_has_one_residual_cache_for_all_steps(sparse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ResidualCache] = []

    class Counted(ResidualCache):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(sparse_attention, "ResidualCache", Counted)
    latents(sparse, PROMPTS[0])
    assert len(made) == len(BLOCKS)


def test_a_second_call_begins_anew(sparse: Any, expected: Tensor) -> None:
    assert torch.equal(latents(sparse, PROMPTS[0]), expected)


def test_another_resolution_in_between(sparse: Any, expected: Tensor) -> None:
    other = {"height": 64, "width": 32, "num_frames": 13}
    first = latents(sparse, PROMPTS[0], shape=other)
    assert torch.equal(latents(sparse, PROMPTS[0]), expected)
    assert torch.equal(latents(sparse, PROMPTS[0], shape=other), first)


@pytest.mark.parametrize("numbers", [0, 2**24])
def test_a_batch_is_its_videos_one_by_one(sparse: Any, monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Whether elements with as many tokens, here the first and the last, are attended together or not."""
    calls: list[tuple[int, int]] = []
    attend = SparseAttention.attend

    def counted(self: SparseAttention, block: str, item: int, *qkv: Tensor) -> Tensor:
        if block == BLOCKS[0]:
            calls.append((item, qkv[0].shape[0]))
        return attend(self, block, item, *qkv)

    monkeypatch.setattr(hunyuan_video_attention, "TOGETHER", numbers)
    monkeypatch.setattr(SparseAttention, "attend", counted)
    prompts, start = [*PROMPTS, PROMPTS[0].replace("down", "up")], noise(7, 3)
    together = latents(sparse, prompts, latents=start)
    assert calls == [(0, 6), (1, 3)] * 5 if numbers else [(0, 3), (1, 3), (2, 3)] * 5
    for item, prompt in enumerate(prompts):
        alone = latents(sparse, prompt, latents=start[item : item + 1])
        assert error(together[item : item + 1], alone) < 1e-4


def test_several_videos_of_one_prompt(sparse: Any) -> None:
    start = noise(8, 2)
    together = latents(sparse, PROMPTS[1], latents=start, num_videos_per_prompt=2)
    for item in range(2):
        alone = latents(sparse, PROMPTS[1], latents=start[item : item + 1])
        assert error(together[item : item + 1], alone) < 1e-4


def test_guidance_has_a_cache_for_each_of_its_two_passes(sparse: Any) -> None:
    guided = latents(sparse, PROMPTS[0], seed=3, negative_prompt=PROMPTS[1], true_cfg_scale=2.5)
    # The same with a model of its own for each pass.
    positive, negative = open_pipeline(SPEC), open_pipeline(SPEC)
    texts = [p.encode_prompt(t, max_sequence_length=32) for p, t in ((positive, PROMPTS[0]), (negative, PROMPTS[1]))]
    scheduler = positive.scheduler
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, 6)[:-1].tolist())
    state = noise(3)
    with torch.no_grad():
        for time in scheduler.timesteps:
            outs = [
                pipeline.transformer(
                    hidden_states=state,
                    timestep=time.reshape(1),
                    encoder_hidden_states=text[0],
                    encoder_attention_mask=text[2],
                    pooled_projections=text[1],
                    guidance=torch.tensor([6000.0]),
                    return_dict=False,
                )[0]
                for pipeline, text in zip((positive, negative), texts, strict=True)
            ]
            state = scheduler.step(outs[1] + 2.5 * (outs[0] - outs[1]), time, state, return_dict=False)[0]
    assert error(guided, state) < 1e-5


def test_a_generation_that_fails_leaves_nothing_behind(sparse: Any, expected: Tensor) -> None:
    tracker: GenerationTracker = sparse.tracker

    def fail(_pipeline: Any, step: int, _time: Any, _state: Any) -> dict[str, Any]:
        if step == 3:
            assert tracker.num_states == 1
            raise RuntimeError("out of patience")
        return {}

    with raises(RuntimeError, "out of patience"):
        latents(sparse, PROMPTS[0], seed=5, callback_on_step_end=fail)
    gc.collect()
    assert tracker.num_states == 0
    assert torch.equal(latents(sparse, PROMPTS[0]), expected)
    gc.collect()
    assert tracker.num_states == 0


def test_head_kinds_found_while_generating(sparse: Any) -> None:
    online = open_pipeline(replace(SPEC, head_kinds={}, online=True))
    first = latents(online, PROMPTS[0])
    assert torch.equal(latents(online, PROMPTS[0]), first)


def test_dense_steps_and_blocks_are_dense(dense: Any) -> None:
    plain = latents(dense, PROMPTS[0])
    most = replace(SPEC, residual=Residual(order=0), dense_blocks=BLOCKS)
    assert error(latents(open_pipeline(most), PROMPTS[0]), plain) < 1e-4
    steps = replace(SPEC, residual=Residual(order=0), dense_above=0.0)
    assert error(latents(open_pipeline(steps), PROMPTS[0]), plain) < 1e-4


def test_latents_too_small_for_a_band_run_dense_with_a_warning(
    dense: Any, sparse: Any, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    small = {"height": 16, "width": 16, "num_frames": 1}
    with caplog.at_level(logging.WARNING, logger="reelquant.runtime.sparse_attention"):
        found = latents(sparse, PROMPTS[0], shape=small)
        latents(sparse, PROMPTS[1], shape=small)
    [warned] = [record.message for record in caplog.records if "[1, 8, 1, 4, 4]" in record.message]
    assert "runs dense" in warned, "once for all generations"
    assert error(found, latents(dense, PROMPTS[0], shape=small)) < 1e-4
    assert torch.equal(latents(sparse, PROMPTS[0]), expected)


def test_what_does_not_fit_is_refused() -> None:
    with raises(ValueError, "head_kinds", "single_transformer_blocks.5"):
        open_pipeline(replace(SPEC, head_kinds={k: v for k, v in SPEC.head_kinds.items() if k != BLOCKS[-1]}))
    with raises(ValueError, "head_kinds", "transformer_blocks.0", 2, 3):
        open_pipeline(replace(SPEC, head_kinds={**SPEC.head_kinds, BLOCKS[0]: "st"}))
    with raises(ValueError, "transformer_blocks.7"):
        open_pipeline(replace(SPEC, dense_blocks=("transformer_blocks.7",)))
    with raises(ValueError, "residual.rank", 65, 64):
        open_pipeline(replace(SPEC, residual=Residual(rank=65)))


def test_specification_is_json_and_back() -> None:
    import json

    spec = replace(SPEC, dense_blocks=(BLOCKS[0],), dense_above=0.9)
    assert SparseAttentionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert not {"refresh_at", "gain"} & ({*spec.to_dict()} | {*spec.to_dict()["residual"]}), "as before there were any"
    damped = replace(spec, refresh_at=(0.8, 0.25), residual=Residual(order=1, gain=(0.9, 0.5)))
    assert SparseAttentionSpec.from_dict(json.loads(json.dumps(damped.to_dict()))) == damped


MISTAKES: list[tuple[dict[str, Any], tuple[object, ...]]] = [
    ({"density": 0}, ("density", 0)),
    ({"density": 0.2, "interval": 0}, ("interval", 0)),
    ({"density": 0.2, "residual": {"order": 3}}, ("residual.order", 3)),
    ({"density": 0.2, "residual": {"rank": 0}}, ("residual.rank", 0)),
    ({"density": 0.2, "residual": {"rank": None}}, ("residual.storage", "low_rank", "residual.rank")),
    ({"density": 0.2, "colour": 1}, ("colour",)),
    ({"head_kinds": {}}, ("density",)),
    ({"density": 0.2, "refresh_at": [0.5, 0.5]}, ("refresh_at", [0.5, 0.5])),
    ({"density": 0.2, "refresh_at": [1.5]}, ("refresh_at", [1.5])),
    ({"density": 0.2, "refresh_at": [0.5], "residual": {"order": 0}}, ("refresh_at", "residual.order")),
    ({"density": 0.2, "residual": {"order": 1, "gain": 0.9}}, ("gain", 0.9)),
    ({"density": 0.2, "residual": {"colour": 1}}, ("residual.colour",)),
]


@pytest.mark.parametrize(("wrong", "words"), MISTAKES)
def test_a_specification_that_cannot_be(wrong: dict[str, Any], words: tuple[object, ...]) -> None:
    with raises(ValueError, "sparse_attention", *words):
        SparseAttentionSpec.from_dict(wrong)


def test_refreshes_are_an_interval_apart_and_end_the_dense_steps() -> None:
    spec, levels = replace(SPEC, interval=4), LEVELS(12)

    def steps(spec: SparseAttentionSpec, kind: str) -> list[int]:
        return [step for step, found in enumerate(spec.schedule(levels)) if found == kind]

    assert steps(spec, "refresh") == [0, 4, 8]
    late = replace(spec, dense_above=dense_threshold(3, levels, refreshes=True))
    assert steps(late, "refresh") == [2, 6, 10]
    assert steps(late, "dense") == [0, 1]
    plain = Residual(order=0)
    naive = replace(spec, dense_above=dense_threshold(3, levels, refreshes=False), residual=plain)
    assert steps(naive, "dense") == [0, 1, 2]
    assert steps(naive, "refresh") == []


def test_the_second_of_two_experts_is_not_dense_again() -> None:
    """Its passes begin in the middle of the schedule: counted steps would begin anew."""
    levels = LEVELS(10)
    spec = replace(SPEC, dense_above=dense_threshold(3, levels, refreshes=True))
    assert spec.schedule(levels[:5]) == ["dense", "dense", "refresh", "sparse", "sparse"]
    assert spec.schedule(levels[5:]) == ["refresh", "sparse", "sparse", "refresh", "sparse"]


@pytest.mark.parametrize("num_steps", [9, 16, 50])
def test_refreshes_at_steps_given(num_steps: int) -> None:
    levels = LEVELS(num_steps)
    at = [1, 2, 3, 5, num_steps - 1]
    spec = replace(SPEC, refresh_at=refresh_thresholds(at, levels))
    kinds = spec.schedule(levels)
    assert [step for step, kind in enumerate(kinds) if kind == "refresh"] == [0, *at]
    assert "dense" not in kinds
    rounded = [float(torch.tensor(level * 1000).bfloat16()) / 1000 for level in levels]
    if len(set(rounded)) == num_steps:
        assert spec.schedule(rounded) == kinds
    warm = replace(spec, dense_above=dense_threshold(3, levels, refreshes=True))
    kinds = warm.schedule(levels)
    assert kinds[:6] == ["dense", "dense", "refresh", "refresh", "sparse", "refresh"]
    # In a generation with other steps the refreshes lie at the same noise levels, one step each.
    other = LEVELS(4 * num_steps)
    refreshed = [level for level, kind in zip(other, spec.schedule(other), strict=True) if kind == "refresh"]
    assert len(refreshed) == len(at) + 1
    for level, step in zip(refreshed[1:], at, strict=True):
        assert levels[step] - 1e-6 <= level < levels[step - 1]


def test_adjacent_keeps_the_residual_of_dense_steps_too() -> None:
    levels = LEVELS(12)
    residual = Residual(order=2, extrapolation="adjacent")
    spec = replace(SPEC, residual=residual, interval=4, dense_above=dense_threshold(3, levels, refreshes=True))
    assert spec.schedule(levels)[:5] == ["refresh", "refresh", "refresh", "sparse", "sparse"]
    plain = replace(spec, residual=replace(residual, extrapolation="linear"))
    blocks, layout = BLOCKS, TokenLayout(3, 8, 12, 9)
    both = [s.effective_density(layout, 5, noise_levels=levels, blocks=blocks) for s in (spec, plain)]
    assert both[0] == both[1], "a refresh is a dense step"


def test_every_way_to_correct_is_a_generation_of_its_own(dense: Any) -> None:
    """What the specification says reaches the attention that runs: refreshes given, adjacent changes, gains."""
    levels, plain = LEVELS(5), latents(dense, PROMPTS[0])
    first = Residual(order=1, rank=8)
    specs = {
        "order 1": replace(SPEC, residual=first, interval=4),
        "damped": replace(SPEC, residual=replace(first, gain=(0.5,)), interval=4),
        "refreshed": replace(SPEC, residual=first, refresh_at=refresh_thresholds([1, 4], levels)),
        "warm": replace(SPEC, residual=first, interval=5, dense_above=dense_threshold(2, levels, refreshes=True)),
        "adjacent": replace(
            SPEC,
            residual=Residual(order=2, rank=8, extrapolation="adjacent"),
            interval=5,
            dense_above=dense_threshold(2, levels, refreshes=True),
        ),
    }
    found = {name: latents(open_pipeline(spec), PROMPTS[0]) for name, spec in specs.items()}
    errors = {name: error(out, plain) for name, out in found.items()}
    assert len({round(e, 6) for e in errors.values()}) == len(specs), errors
    same = replace(SPEC, residual=replace(first, gain=(1.0,)), refresh_at=refresh_thresholds([4], levels))
    assert torch.equal(latents(open_pipeline(same), PROMPTS[0]), found["order 1"])
