"""Chooses the calibration samples among all candidates (method §2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reelquant.calibration.salience import diffusion_features, diffusion_salience, minmax, select_salient
from storage.unit_store import UnitStore
from workers.candidates import STRATEGIES, prompts_of, shortage
from workers.messages import Progress, PromptUnit, SelectionSettings, SelectionUnit, UnitOutput
from workers.process import device_name, peak_memory_bytes, prepare_process, unit_seed


class SelectionWorker:
    """Its one unit reads the salience of all trajectories; the result lists the choice and every candidate's scores."""

    BESIDE_KEPT_PIPELINE = True

    def __init__(self, settings: SelectionSettings) -> None:
        self._settings = settings
        self._device, _ = prepare_process(settings.source.numerics)

    def run(self, unit: SelectionUnit, progress: Progress, store: UnitStore) -> UnitOutput:
        """Scores all candidates and chooses."""

        def read(prompt: PromptUnit, name: str) -> Tensor:
            return store.read(f"trajectories/{prompt.name}/{name}")

        columns: dict[str, list[Tensor]] = {name: [] for name in ("diffusion", *self._settings.features)}
        for index, prompt in enumerate(unit.prompts):
            for name, column in columns.items():
                column.append(self._diffusion(prompt, read) if name == "diffusion" else read(prompt, name))
            progress(index + 1, len(unit.prompts))
        num_steps = len(columns["diffusion"][0])
        raw = {name: torch.cat(column) for name, column in columns.items()}
        scores = {name: pooled(name, column) for name, column in raw.items()}
        generator = torch.Generator().manual_seed(unit_seed(self._settings.source.seed, "selection"))
        chosen: list[int] = []
        for steps in self._settings.pools or (range(num_steps),):
            pool = [prompt * num_steps + step for prompt in range(len(unit.prompts)) for step in steps]
            found = choose(
                self._settings.strategy,
                *(pooled(name, raw[name][pool]) for name in ("diffusion", self._settings.quantization_feature)),
                num_steps=len(steps),
                num_samples=self._settings.num_samples,
                generator=generator,
            )
            chosen += [pool[candidate] for candidate in found]
        names, feature = [prompt.name for prompt in unit.prompts], self._settings.diffusion_feature
        result = {
            "strategy": self._settings.strategy,
            "quantization_feature": self._settings.quantization_feature,
            **({} if feature == "latent" else {"diffusion_feature": feature}),
            "num_steps": num_steps,
            "prompts": [{"name": prompt.name, "prompt": prompt.prompt} for prompt in unit.prompts],
            "scores": {name: column.reshape(len(names), num_steps).tolist() for name, column in scores.items()},
            "chosen": [{"prompt": names[i // num_steps], "step": i % num_steps} for i in chosen],
        }
        return UnitOutput(result, device_name(self._device), peak_memory_bytes(self._device))

    def _diffusion(self, prompt: PromptUnit, read: Callable[[PromptUnit, str], Tensor]) -> Tensor:
        """`[T]`: recorded for the latents, otherwise from the stored ones, a prompt at a time."""
        settings = self._settings
        if settings.diffusion_feature == "latent":
            return read(prompt, "diffusion")
        rows = diffusion_features(read(prompt, "latents"), settings.sigmas, settings.diffusion_feature)
        return diffusion_salience(rows)

    def shadow(self, unit: SelectionUnit, progress: Progress, store: UnitStore) -> None:
        """The other ranks of a replica have nothing to do."""


def pooled(name: str, scores: Tensor) -> Tensor:
    """One number per candidate; blocks are min-max normalized over the whole pool, then averaged."""
    if name != "block_input":
        return scores.double()
    return torch.stack([minmax(column) for column in scores.T]).mean(dim=0).double()


def choose(
    strategy: str,
    diffusion: Tensor,
    quantization: Tensor,
    *,
    num_steps: int,
    num_samples: int,
    generator: torch.Generator,
) -> list[int]:
    """Indices of the chosen candidates; candidate `p * num_steps + t` is step `t` of prompt `p`.

    | strategy | takes |
    |---|---|
    | `uniform` | the step in the middle of each of `num_samples` equal bins of the schedule; prompts equally often, +-1 |
    | `salience` | the highest product scores, best first |
    | `stratified` | the steps of `uniform`, at each the prompts with the highest product scores |
    | `one_prompt`, `five_prompts` | all steps of the first one or five prompts, evenly thinned to `num_samples` |
    | `random_timesteps` | random steps of the first five prompts |
    | `random` | random candidates |

    Args:
        diffusion, quantization: the two scores `[candidates]`; `uniform` and the last four rows ignore them.
        generator: of `uniform`'s order of prompts, and of the random strategies.

    Raises:
        ValueError: fewer candidates than samples asked for, or an unknown strategy.
    """
    num_prompts = len(diffusion) // num_steps
    if problem := shortage(strategy, num_samples=num_samples, num_prompts=num_prompts, num_steps=num_steps):
        raise ValueError(problem)
    candidates = prompts_of(strategy, num_prompts) * num_steps
    if strategy == "uniform":
        return _uniform(num_prompts, num_steps, num_samples, generator=generator)
    if strategy == "salience":
        return [int(i) for i in select_salient(diffusion.float(), quantization.float(), num_samples)]
    if strategy == "stratified":
        ranked = [int(i) for i in select_salient(diffusion.float(), quantization.float(), len(diffusion))]
        return _stratified(ranked, num_steps, num_samples)
    if strategy in ("one_prompt", "five_prompts"):
        return [(2 * i + 1) * candidates // (2 * num_samples) for i in range(num_samples)]
    if strategy in ("random", "random_timesteps"):
        return sorted(torch.randperm(candidates, generator=generator)[:num_samples].tolist())
    raise ValueError(f"selection.strategy {strategy!r} is unknown: one of {', '.join(STRATEGIES)}")


def _middle_steps(num_steps: int, num_samples: int) -> list[int]:
    """The step in the middle of each of `num_samples` equal bins of the schedule, ascending. With more samples than steps
    every step is there floor or ceil of `num_samples / num_steps` times."""
    return [(2 * i + 1) * num_steps // (2 * num_samples) for i in range(num_samples)]


def _uniform(num_prompts: int, num_steps: int, num_samples: int, *, generator: torch.Generator) -> list[int]:
    """The middle steps, prompts in rounds: each round is a random permutation of all prompts, so that no prompt is tied to
    a part of the schedule. A step that two rounds share takes no prompt twice."""
    steps = _middle_steps(num_steps, num_samples)
    prompts: list[int] = []
    while len(prompts) < num_samples:
        step = steps[len(prompts)]
        taken = {prompt for prompt, at in zip(prompts, steps, strict=False) if at == step}
        drawn = [int(i) for i in torch.randperm(num_prompts, generator=generator)]
        first = [prompt for prompt in drawn if prompt not in taken][: steps.count(step) - len(taken)]
        prompts += first + [prompt for prompt in drawn if prompt not in first]
    return [prompt * num_steps + step for prompt, step in zip(prompts, steps, strict=False)]


def _stratified(ranked: list[int], num_steps: int, num_samples: int) -> list[int]:
    """For each of `num_samples` evenly spaced places of the schedule, the best candidate left of that step (of the next
    step that has one)."""
    left = [[i for i in ranked if i % num_steps == step] for step in range(num_steps)]
    chosen: list[int] = []
    for step in _middle_steps(num_steps, num_samples):
        places = (left[(step + k) % num_steps] for k in range(num_steps))
        chosen.append(next(place for place in places if place).pop(0))
    return chosen
