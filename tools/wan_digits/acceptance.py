"""Stage `accept`: which of the papers' claims the model can examine, a line each, before any study on it.

| line | bar |
|---|---|
| read | both digits read in 97 % of the videos |
| noise floor | 50 dB between two attention backends, float32, in 98 % of the videos |
| forks | under 2 % of the videos of `rtn` W4A8 show another instance |
| denoised | the denoised prediction still moves by 5 % in the second half of the steps |
| skew | the strongest 10 % of the tokens hold 30 % of the attention in half of the blocks |
| shift | `rtn` W4A8 moves the attention's output by 0.05 (squared, relative) |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from reelquant.attention.column_sums import attention_column_sums
from reelquant.families.attention_core import attention_core, plain_core, set_attention_core
from reelquant.families.wan import FAMILY
from tools.wan_digits.evaluation import generate, score
from tools.wan_digits.scenes import prompt
from tools.wan_digits.settings import Settings
from workers.recognition import DigitRecognizer

OTHER_BACKEND = "_native_math"
STRONGEST = 0.1
"""Part of the tokens whose share of the attention counts."""
FORK_DB = 26.0
"""PSNR under which a video shows another instance: the valley of the histogram, which is kept beside the line."""
BARS = {"read": 0.97, "noise_floor": 0.98, "forks": 0.02, "denoised": 0.05, "skew": 0.5, "shift": 0.05}


def measure(exact: Any, quantized: Any, scenes: list[list[int]], settings: Settings, recognizer: DigitRecognizer,
            num_watched: int = 4) -> dict[str, Any]:  # fmt: skip
    """All lines, and what they were read off.

    Args:
        exact: the pipeline in float32.
        quantized: the same after `rtn` W4A8.
        scenes: of the prompts.
        num_watched: prompts whose attention is watched at every tenth step.
    """
    clip = settings.large
    videos = generate(exact, scenes, settings, clip)
    read, moved, _ = score(videos, scenes, recognizer, clip)
    exact.transformer.set_attention_backend(OTHER_BACKEND)
    floor = psnr(generate(exact, scenes, settings, clip), videos)
    exact.transformer.set_attention_backend("native")
    found = psnr(generate(quantized, scenes, settings, clip), videos)
    watched = [watch(exact, quantized, scene, settings, seed) for seed, scene in enumerate(scenes[:num_watched])]
    shares = torch.stack([one["shares"] for one in watched]).mean((0, 1))
    shifts = torch.stack([one["shifts"] for one in watched]).mean((0, 1))
    lines = {
        "read": read,
        "noise_floor": float((floor >= 50).float().mean()),
        "forks": float((found < FORK_DB).float().mean()),
        "denoised": sum(one["denoised"] for one in watched) / len(watched),
        "skew": float((shares >= 0.3).float().mean()),
        "shift": float(shifts.mean()),
    }
    met = {name: lines[name] <= bar if name == "forks" else lines[name] >= bar for name, bar in BARS.items()}
    return {
        "lines": lines, "met": met, "path_right": moved, "videos": len(scenes), "steps": settings.eval_steps,
        "noise_floor_db": _rounded(floor), "rtn_psnr_db": _rounded(found),
        "strongest_tenth_by_block": _rounded(shares), "shift_by_block": _rounded(shifts, 4),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The lines as Markdown."""
    rows = [f"| {name} | {bar:g} | {found['lines'][name]:.4f} | {'met' if found['met'][name] else 'missed'} |"
            for name, bar in BARS.items()]  # fmt: skip
    return "\n".join(["| line | bar | measured | |", "|---|---|---|---|", *rows])


def psnr(videos: Tensor, reference: Tensor) -> Tensor:
    """`[N]` in dB of videos `[N, F, H, W, 3]` in [0, 1]; equal ones have 200."""
    mse = (videos - reference).square().flatten(1).mean(1)
    return -10 * mse.clamp(min=1e-20).log10()


@torch.no_grad()
def watch(exact: Any, quantized: Any, scene: list[int], settings: Settings, seed: int) -> dict[str, Any]:
    """One generation in full precision, in every tenth of whose steps the quantized transformer sees the same call.

    Returns:
        `shares` and `shifts` `[calls, blocks]`, and how far the denoised prediction moves in the second half, relatively.
    """
    shares: list[Tensor] = []
    shifts: list[Tensor] = []
    denoised: list[Tensor] = []
    every = max(1, settings.eval_steps // 10)
    step, calls = exact.scheduler.step, 0

    def stepped(output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        denoised.append((sample - float(timestep) / 1000 * output).float())
        return step(output, timestep, sample, **kwargs)

    def after(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        nonlocal calls
        calls += 1
        if len(denoised) % every == 0:
            with kept(quantized.transformer) as others:
                quantized.transformer(**kwargs)
            pairs = [(own[-1], other[-1]) for own, other in zip(outputs, others, strict=True)]
            shares.append(torch.stack([_share(q, k) for (q, k, _), _ in pairs]))
            shifts.append(torch.stack([_shift(o, out) for (_, _, out), (_, _, o) in pairs]))

    exact.scheduler.step = stepped
    try:
        with kept(exact.transformer) as outputs:
            handle = exact.transformer.register_forward_hook(after, with_kwargs=True)
            clip = settings.large
            exact(
                prompt(scene), height=clip.height, width=clip.width, num_frames=clip.num_frames, output_type="latent",
                num_inference_steps=settings.eval_steps, guidance_scale=settings.guidance,
                max_sequence_length=settings.text_length, generator=torch.Generator("cpu").manual_seed(seed),
            )  # fmt: skip
            handle.remove()
    finally:
        exact.scheduler.step = step
    middle, last = denoised[len(denoised) // 2], denoised[-1]
    return {
        "shares": torch.stack(shares).cpu(),
        "shifts": torch.stack(shifts).cpu(),
        "denoised": float((middle - last).norm() / last.norm()),
    }


@contextmanager
def kept(transformer: Any) -> Iterator[list[list[tuple[Tensor, Tensor, Tensor]]]]:
    """By block the queries, keys and outputs `[H, L, D]` of its last self-attention."""
    names = FAMILY.block_names(dict(transformer.config))
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in names]
    before = []
    for name, seen in zip(names, found, strict=True):
        block = transformer.get_submodule(name)
        inner = attention_core(FAMILY, block)
        before.append((block, inner))

        def core(item: int, q: Tensor, k: Tensor, v: Tensor, seen: Any = seen, inner: Any = inner) -> Tensor:
            out: Tensor = (inner or plain_core)(item, q, k, v)
            seen[:] = [(q, k, out)]
            return out

        set_attention_core(FAMILY, block, core)
    try:
        yield found
    finally:
        for block, inner in before:
            set_attention_core(FAMILY, block, inner)


def _share(q: Tensor, k: Tensor) -> Tensor:
    """The part of the attention that the strongest tokens get, the mean over heads."""
    sums = attention_column_sums(q, k)
    strongest = sums.topk(max(1, round(STRONGEST * sums.shape[-1])), dim=-1).values
    return (strongest.sum(-1) / sums.sum(-1)).mean()


def _shift(found: Tensor, exact: Tensor) -> Tensor:
    return (found - exact).float().square().sum() / exact.float().square().sum()


def _rounded(values: Tensor, digits: int = 2) -> list[float]:
    return [round(float(value), digits) for value in values]


def open_float32(folder: Any, device: str) -> Any:
    """A pipeline's folder, plain or quantized."""
    import reelquant  # noqa: F401  (teaches diffusers to load the checkpoint)

    return DiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32).to(device)
