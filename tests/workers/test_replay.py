"""Generations begun again from stored latents, in pipelines that mix an image into them, keep a frame to themselves, or draw
noise on the way: step by step they are what they were."""

from collections.abc import Sequence
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from reelquant.settings.generation import Generation
from tests.pipeline.test_image_runs import generation_of
from tests.pipeline.test_prompts import image
from tests.reelquant.families import tiny_pipelines
from tests.unit_cache import ignore
from workers.generation import generate
from workers.messages import PromptUnit
from workers.model_source import family_of_model
from workers.velocity_pass import Velocities
from workers.velocity_watch import changed_velocities, passes_left_out, run_latents, teacher_forced

SEED = 5


@pytest.mark.parametrize(
    ("model", "from_image"),
    [
        ("hunyuan_video_i2v", True),
        ("hunyuan_video_i2v_concat", True),
        ("wan_2_2_i2v", True),
        ("wan_ti2v", True),
        ("cogvideox_1_5", False),
        ("cogvideox_1_5_i2v", True),
        ("ltx_video", False),
    ],
)
def test_what_is_begun_again_from_stored_latents_is_what_it_was(model: str, from_image: bool, tmp_path: Path) -> None:
    folder = getattr(tiny_pipelines, model)(tmp_path / "model")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    content = image(tmp_path / "red.png", (192, 128), "red").read_bytes() if from_image else None
    prompt, generation = PromptUnit("p", "the digit 3", None, content), Generation(**generation_of(model))
    kept = Velocities()
    with kept.kept(pipeline):
        made = generate(pipeline, prompt, generation, seed=SEED, progress=ignore)
    latents = torch.stack(made.latents)
    final: list[Tensor] = []

    def after(_step: int, own: Tensor) -> Tensor:
        final.append(own[0].float().clone())
        return own

    def again(noise: Tensor) -> list[Tensor]:
        final.clear()
        rows = noise.unsqueeze(0)
        run_latents(pipeline, [prompt], generation, latents=rows, seeds=[SEED], after_step=after, progress=ignore)
        return list(final)

    for found, known in zip(again(latents[0]), latents[1:], strict=True):
        assert torch.equal(found, known)
    assert not torch.equal(again(-latents[0])[-1], latents[-1]), "the given latents count"
    errors = []

    def see(step: int, velocity: Tensor, _passes: Sequence[Tensor]) -> None:
        errors.append(float((velocity[0] - kept.guided[step]).norm()))

    teacher_forced(
        pipeline, [prompt], generation, latents=latents.unsqueeze(1), seeds=[SEED], watch=see, progress=ignore
    )
    assert errors == [0.0] * generation.num_inference_steps

    def stored(step: int, _own: Tensor, _sample: Tensor) -> Tensor:
        return kept.guided[step].unsqueeze(0)

    with passes_left_out(pipeline, family_of_model(folder), lambda: True), changed_velocities(pipeline, stored):
        assert torch.equal(again(latents[0])[-1], latents[-1]), "of stored velocities, without a pass"
