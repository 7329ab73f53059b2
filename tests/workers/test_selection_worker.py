"""The choice among candidates, on scores small enough to check by hand, and the worker on a real store."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reelquant.settings.generation import Numerics
from tests.errors import raises
from tests.unit_cache import UnitCache
from workers.candidates import STRATEGIES
from workers.messages import PromptUnit, RunSource, SelectionSettings, SelectionUnit
from workers.selection_worker import SelectionWorker, choose, pooled

PROMPTS, STEPS = 7, 6


def scores(seed: int) -> torch.Tensor:
    return torch.rand(PROMPTS * STEPS, generator=torch.Generator().manual_seed(seed))


def chosen(strategy: str, num: int, *, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return choose(strategy, scores(1), scores(2), num_steps=STEPS, num_samples=num, generator=generator)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_number_asked_for_without_repeats(strategy: str) -> None:
    found = chosen(strategy, 5)
    assert len(found) == len(set(found)) == 5
    assert all(0 <= i < PROMPTS * STEPS for i in found)
    assert found == chosen(strategy, 5), "the same seed chooses the same"


def test_salience_keeps_the_largest_products_best_first() -> None:
    diffusion, quantization = scores(1), scores(2)
    normal = [(c - c.min()) / (c.max() - c.min()) for c in (diffusion, quantization)]
    best = torch.argsort(normal[0] * normal[1], descending=True)[:4].tolist()
    assert chosen("salience", 4) == best


def test_stratified_covers_the_schedule_with_the_best_of_every_step() -> None:
    diffusion, quantization = scores(1), scores(2)
    normal = [(c - c.min()) / (c.max() - c.min()) for c in (diffusion, quantization)]
    product = (normal[0] * normal[1]).reshape(PROMPTS, STEPS)
    assert chosen("stratified", STEPS) == [int(product[:, step].argmax()) * STEPS + step for step in range(STEPS)]
    assert sorted(chosen("stratified", PROMPTS * STEPS)) == list(range(PROMPTS * STEPS))


def test_the_pools_of_the_other_strategies() -> None:
    assert {i // STEPS for i in chosen("one_prompt", STEPS)} == {0}
    assert chosen("one_prompt", STEPS) == list(range(STEPS)), "all timesteps of one prompt"
    assert {i // STEPS for i in chosen("five_prompts", 5 * STEPS)} == {0, 1, 2, 3, 4}
    assert max(chosen("random_timesteps", 25)) < 5 * STEPS
    assert chosen("random", 5) != chosen("random", 5, seed=1)


@st.composite
def pools(draw: st.DrawFn) -> tuple[int, int, int]:
    """Prompts, steps, and a number of samples that they have candidates for."""
    num_prompts, num_steps = draw(st.integers(1, 12)), draw(st.integers(2, 50))
    return num_prompts, num_steps, draw(st.integers(1, num_prompts * num_steps))


def uniform(num_prompts: int, num_steps: int, num_samples: int, *, seed: int) -> list[tuple[int, int]]:
    """The chosen (prompt, step) pairs."""
    none, generator = torch.zeros(num_prompts * num_steps), torch.Generator().manual_seed(seed)
    found = choose("uniform", none, none, num_steps=num_steps, num_samples=num_samples, generator=generator)
    return [divmod(i, num_steps) for i in found]


@given(pool=pools(), seed=st.integers(0, 2**63 - 1))
def test_uniform_takes_one_sample_a_bin_and_every_prompt_equally_often(pool: tuple[int, int, int], seed: int) -> None:
    num_prompts, num_steps, num_samples = pool
    pairs = uniform(*pool, seed=seed)
    assert len(set(pairs)) == len(pairs) == num_samples, "no pair twice"
    for i, (_, step) in enumerate(pairs):
        # Step t covers [t, t + 1) of the schedule, bin i [i T / N, (i + 1) T / N): they overlap.
        assert step * num_samples < (i + 1) * num_steps
        assert i * num_steps < (step + 1) * num_samples
    steps = Counter(step for _, step in pairs)
    if num_samples <= num_steps:
        assert max(steps.values()) == 1
    else:
        assert {steps[t] for t in range(num_steps)} <= {num_samples // num_steps, -(-num_samples // num_steps)}
    prompts = Counter(prompt for prompt, _ in pairs)
    assert {prompts[p] for p in range(num_prompts)} <= {num_samples // num_prompts, -(-num_samples // num_prompts)}
    assert pairs == uniform(*pool, seed=seed), "the same seed chooses the same"


@given(num_prompts=st.integers(5, 12), num_steps=st.integers(12, 50))
def test_the_seed_decides_uniform_s_prompts_and_not_its_steps(num_prompts: int, num_steps: int) -> None:
    found = [uniform(num_prompts, num_steps, num_prompts, seed=seed) for seed in range(8)]
    assert len({tuple(prompt for prompt, _ in pairs) for pairs in found}) > 1
    assert len({tuple(step for _, step in pairs) for pairs in found}) == 1


def test_uniform_ties_no_prompt_to_a_part_of_the_schedule() -> None:
    """With as many rounds as steps / prompts, prompts in the same order in all of them would meet every tenth step only."""
    gaps = {seed: [step for prompt, step in uniform(10, 50, 50, seed=seed) if prompt == 0] for seed in range(5)}
    assert all(len({step % 10 for step in steps}) > 1 for steps in gaps.values())


def test_uniform_can_take_all_candidates() -> None:
    assert sorted(chosen("uniform", PROMPTS * STEPS)) == list(range(PROMPTS * STEPS))


def test_fewer_candidates_than_samples_is_an_error_with_both_numbers() -> None:
    with raises(ValueError, "selection.num_samples", 7, "one_prompt", 6, "prompts.num_calibration"):
        chosen("one_prompt", 7)


def test_block_scores_are_normalized_per_block_then_averaged() -> None:
    raw = torch.tensor([[1.0, 500.0], [2.0, 400.0], [3.0, 300.0]])
    assert pooled("block_input", raw).tolist() == pytest.approx([0.5, 0.5, 0.5])


def test_the_worker_stores_all_scores_and_chooses(tmp_path: Path) -> None:
    run = UnitCache(tmp_path / "run")
    prompts = tuple(PromptUnit(f"prompt-{i:03d}", f"prompt {i}") for i in range(3))
    for index, prompt in enumerate(prompts):
        arrays = dict.fromkeys(("diffusion", "latent", "weight_error"), torch.arange(4.0) + 10 * index + 1)
        run.write("trajectories", prompt.name, {**arrays, "block_input": torch.rand(4, 2) + index})
    source = RunSource(tmp_path, 0, Numerics("float32", 1))
    worker = SelectionWorker(SelectionSettings(source, "salience", "weight_error", 2))  # all features are recorded
    result = run.do(worker, "selection", SelectionUnit("selection", prompts)).result
    assert result["chosen"] == [{"prompt": "prompt-002", "step": 3}, {"prompt": "prompt-002", "step": 2}]
    assert set(result["scores"]) == {"diffusion", "latent", "block_input", "weight_error"}
    assert result["scores"]["latent"][1] == [11.0, 12.0, 13.0, 14.0]


def test_the_worker_takes_the_network_s_change_from_the_stored_latents(tmp_path: Path) -> None:
    """Latents whose predictions change at steps 1 and 2 alone, in a schedule whose steps grow towards the end."""
    run = UnitCache(tmp_path / "run")
    prompts, sigmas = (PromptUnit("prompt-000", "a"),), (1.0, 0.95, 0.8, 0.5, 0.0)
    generator = torch.Generator().manual_seed(0)
    first, second, third, noise = (torch.randn(2, 3, generator=generator) for _ in range(4))
    latents = [noise]
    for step, prediction in enumerate((first, second, third, third)):
        velocity = (latents[-1] - prediction) / sigmas[step]
        latents.append(latents[-1] + (sigmas[step + 1] - sigmas[step]) * velocity)
    stored = {"latents": torch.stack(latents), "diffusion": torch.arange(4.0), "latent": torch.tensor([3.0, 1, 2, 4])}
    run.write("trajectories", "prompt-000", stored)
    source = RunSource(tmp_path, 0, Numerics("float32", 1))
    unit = SelectionUnit("selection", prompts)

    def chosen_by(feature: str, sigmas: tuple[float, ...]) -> dict[str, Any]:
        settings = SelectionSettings(source, "salience", "latent", 2, ("latent",), feature, sigmas)
        return dict(run.do(SelectionWorker(settings), "selection", unit).result)

    plain, denoised = chosen_by("latent", ()), chosen_by("denoised", sigmas)
    assert [c["step"] for c in plain["chosen"]] == [3, 2]
    assert "diffusion_feature" not in plain
    assert denoised["chosen"][0]["step"] == 2
    assert denoised["diffusion_feature"] == "denoised"
    [scores] = denoised["scores"]["diffusion"]
    assert scores[0] == 0
    assert scores[3] == pytest.approx(0, abs=1e-9)
    assert scores[2] == pytest.approx(float((third - second).square().sum() / third.square().sum()), rel=1e-4)


def test_the_worker_reads_what_the_trajectories_recorded(tmp_path: Path) -> None:
    run = UnitCache(tmp_path / "run")
    prompts = tuple(PromptUnit(f"prompt-{i:03d}", f"prompt {i}") for i in range(3))
    for prompt in prompts:
        run.write("trajectories", prompt.name, {name: torch.rand(4) for name in ("diffusion", "latent")})
    settings = [
        SelectionSettings(RunSource(tmp_path, seed, Numerics("float32", 1)), "uniform", "latent", 4, ("latent",))
        for seed in (0, 0, 1, 2, 3)
    ]
    results = [run.do(SelectionWorker(s), "selection", SelectionUnit("selection", prompts)).result for s in settings]
    assert set(results[0]["scores"]) == {"diffusion", "latent"}
    assert [c["step"] for c in results[0]["chosen"]] == [0, 1, 2, 3]
    assert results[0] == results[1]
    assert any(result["chosen"] != results[0]["chosen"] for result in results[2:]), "the run's seed decides"
