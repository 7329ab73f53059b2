"""What CogVideoX's declaration says, beside what holds for every family (`test_conformance`)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from reelquant.calibration.block_call import Recording, Streams
from reelquant.calibration.block_rounding import group_inputs, stream_weights
from reelquant.calibration.input_groups import block_calls
from reelquant.calibration.sample import Sample
from reelquant.families.cogvideox import FAMILY
from reelquant.settings.generation import Generation
from tests.errors import raises
from tests.reelquant.families import tiny_pipelines
from tests.reelquant.families.tiny_models import TINY
from workers.generation import generate
from workers.messages import PromptUnit
from workers.model_source import compression, empty_block
from workers.step_effects import Trajectory, step_effects
from workers.velocity_pass import Velocities

STEPS = 4
GENERATION = Generation(32, 48, 9, STEPS, 3.0, 16)


@pytest.fixture(scope="module")
def model() -> Any:
    return TINY["CogVideoX"].model()


def test_text_stands_in_front_of_the_video_in_what_reads_both(model: Any) -> None:
    """Token weights are video first, as attention's core is."""
    call, name = TINY["CogVideoX"].call(), FAMILY.block_names(model.config)[0]
    entries: list[Streams] = []
    recording = Recording(FAMILY, model, call, [name])
    with torch.no_grad(), recording.watching(lambda _name, streams: entries.extend([streams] if streams else [])):
        model(**call)
    constants, block, block_call = (
        recording.constants,
        model.get_submodule(name),
        block_calls(FAMILY, model.config)[name],
    )
    assert constants is not None
    num_video, num_text = constants.layout.num_video, constants.layout.num_text
    assert num_text == 8

    def inputs(streams: Streams) -> Tensor:
        return group_inputs(block_call, block, ["attn1.to_q"], streams, constants)["attn1.to_q"]

    for stream, token, place in (("hidden_states", 5, 5), ("encoder_hidden_states", 2, num_video + 2)):
        changed = {key: value.clone() for key, value in entries[0].items()}
        changed[stream][0, token] += torch.arange(32.0)
        rows = (inputs(changed) != inputs(entries[0])).any(dim=1)
        weights = torch.eye(num_video + num_text)[place]
        sample = Sample(entries[0], entries[0], constants, weights=weights)
        found = stream_weights(block_call, "joint", sample)
        assert isinstance(found, Tensor)
        assert torch.equal(found[:, 0], rows.float()), stream
        own = "video" if stream == "hidden_states" else "text"
        alone = stream_weights(block_call, own, sample)
        assert isinstance(alone, Tensor)
        assert float(alone[token]) == float(alone.sum()) == 1


def test_a_step_s_effect_is_that_of_its_error_where_the_scheduler_draws_noise(tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(str(tiny_pipelines.cogvideox_1_5(tmp_path / "model")))
    pipeline.set_progress_bar_config(disable=True)
    prompt, velocities = PromptUnit("p", "the digit 3"), Velocities()
    with velocities.kept(pipeline):
        made = generate(pipeline, prompt, GENERATION, seed=1, progress=lambda *_: None)
    assert made.video.shape == (9, 32, 48, 3)
    assert made.latents[0].shape[0] == 4, "one frame more than the video's three, for a whole token"
    trajectory = Trajectory(prompt, torch.stack(made.latents), torch.stack(velocities.guided), seed=1)
    errors = {step: torch.randn_like(trajectory.velocity[0]) for step in (1, STEPS - 1)}
    alone, together = (
        step_effects(pipeline, FAMILY, trajectory, GENERATION, errors=errors, rows=rows, progress=lambda *_: None)
        for rows in (1, 3)
    )
    for step in errors:
        assert alone[step] == pytest.approx(together[step], rel=0.05)
        assert 0 < alone[step] < 10, "another noise would change far more than an error that small"


def test_the_vae_s_levels_say_how_it_compresses(tmp_path: Path) -> None:
    """Neither its configuration nor its class has a ratio on a side."""
    assert compression(tiny_pipelines.cogvideox(tmp_path / "model")) == (4, 4)


def test_other_numbers_of_channels_are_refused(model: Any) -> None:
    with raises(ValueError, 12, 4, 8):
        empty_block({**model.config, "in_channels": 12}, FAMILY, "transformer_blocks.0")


def test_layers_outside_the_blocks() -> None:
    tiny = replace(TINY["CogVideoX-1.5"], settings={**TINY["CogVideoX-1.5"].settings, "num_layers": 1})
    kinds = {n: FAMILY.auxiliary_kind(n) for n, m in tiny.model().named_modules() if isinstance(m, nn.Linear)}
    outside = {n: k for n, k in kinds.items() if not n.startswith("transformer_blocks.")}
    assert {n for n, k in outside.items() if k is None} == {"proj_out", "patch_embed.proj"}
    assert set(outside.values()) == {"embedder", None}
