"""The choice among candidates, on scores small enough to check by hand, and the worker on a real store."""

from pathlib import Path

import pytest
import torch

from storage.run_directory import RunDirectory
from workers.messages import Numerics, PromptUnit, RunSource, SelectionSettings, SelectionUnit
from workers.selection_worker import STRATEGIES, SelectionWorker, choose, pooled

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
    uniform = chosen("uniform", 12)
    assert {i // STEPS for i in uniform} == set(range(PROMPTS)), "all prompts"
    assert sorted(i % STEPS for i in uniform) == sorted([*range(STEPS), *range(STEPS)]), "every step equally often"
    assert sorted(chosen("uniform", PROMPTS * STEPS)) == list(range(PROMPTS * STEPS))
    assert chosen("random", 5) != chosen("random", 5, seed=1)


def test_fewer_candidates_than_samples_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"num_samples is 7.*'one_prompt' has 6 candidates \(1 prompts x 6 steps\)"):
        chosen("one_prompt", 7)


def test_block_scores_are_normalized_per_block_then_averaged() -> None:
    raw = torch.tensor([[1.0, 500.0], [2.0, 400.0], [3.0, 300.0]])
    assert pooled("block_input", raw).tolist() == pytest.approx([0.5, 0.5, 0.5])


def test_the_worker_stores_all_scores_and_chooses(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path / "run", {}, {})
    prompts = tuple(PromptUnit(f"prompt-{i:03d}", f"prompt {i}") for i in range(3))
    for index, prompt in enumerate(prompts):
        for name in ("diffusion", "latent", "weight_error"):
            run.calibration_store.write(f"trajectories/{prompt.name}/{name}", torch.arange(4.0) + 10 * index + 1)
        run.calibration_store.write(f"trajectories/{prompt.name}/block_input", torch.rand(4, 2) + index)
    source = RunSource(run.path, tmp_path, 0, Numerics("float32", 1))
    worker = SelectionWorker(SelectionSettings(source, "salience", "weight_error", 2))
    result = worker.run(SelectionUnit("selection", prompts), lambda *_: None).result
    assert result["chosen"] == [{"prompt": "prompt-002", "step": 3}, {"prompt": "prompt-002", "step": 2}]
    assert set(result["scores"]) == {"diffusion", "latent", "block_input", "weight_error"}
    assert result["scores"]["latent"][1] == [11.0, 12.0, 13.0, 14.0]
