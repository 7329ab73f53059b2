"""Which candidates a selection strategy chooses from, and what it needs to know of them. Imports no torch.

A candidate is one (prompt, step) pair of the calibration trajectories.
"""

from __future__ import annotations

from typing import Literal, get_args

Strategy = Literal["uniform", "salience", "stratified", "one_prompt", "five_prompts", "random_timesteps", "random"]
Feature = Literal["latent", "block_input", "weight_error"]
DiffusionFeature = Literal["latent", "output", "denoised"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
FEATURES: tuple[Feature, ...] = get_args(Feature)

RANKED: frozenset[str] = frozenset({"salience", "stratified"})
"""Strategies that read the candidates' scores."""

_PROMPTS = {"one_prompt": 1, "five_prompts": 5, "random_timesteps": 5}
"""First prompts that a strategy chooses from, where it leaves others out."""


def prompts_of(strategy: str, num_prompts: int) -> int:
    """Number of prompts, from the first, that `strategy` chooses from."""
    return min(_PROMPTS.get(strategy, num_prompts), num_prompts)


def shortage(strategy: str, *, num_samples: int, num_prompts: int, num_steps: int) -> str | None:
    """The problem of a strategy that has fewer candidates than samples to choose; None if it has enough."""
    prompts = prompts_of(strategy, num_prompts)
    if num_samples <= prompts * num_steps:
        return None
    return (
        f"selection.num_samples is {num_samples}, but strategy {strategy!r} has {prompts * num_steps} candidates "
        f"({prompts} prompts x {num_steps} steps): raise prompts.num_calibration or generation.num_inference_steps, or "
        "lower num_samples"
    )
