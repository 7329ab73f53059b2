"""A run of every family but HunyuanVideo from a tiny random pipeline: calibrated, quantized, verified, loaded, generating."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from imageio.v3 import immeta

import reelquant  # noqa: F401
from pipeline.config.loading import ConfigError, load_config
from pipeline.context import build_context
from pipeline.plan import plan_config
from pipeline.report.run_data import read_run
from pipeline.run_state import read_status
from pipeline.runner import open_run
from reelquant.checkpoint.reader import quantized_layers
from reelquant.settings.generation import Generation
from tests.errors import names, raises
from tests.pipeline.small_run import ROOT, Recorded, call, command, small_run
from tests.reelquant.families import tiny_pipelines
from workers.messages import PromptUnit
from workers.pipeline_call import called

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")]
GENERATION: dict[str, dict[str, Any]] = {
    "cogvideox": {"height": 32, "width": 48, "num_frames": 9},
    "cogvideox_1_5": {"height": 32, "width": 48, "num_frames": 9},
    "hunyuan_video_15": {"height": 64, "width": 96, "num_frames": 9},
    "ltx_video": {"height": 32, "width": 64, "num_frames": 9},
    "mochi": {"height": 32, "width": 48, "num_frames": 7},
    "wan_2_2": {"height": 64, "width": 96, "num_frames": 9},
}
PROMPT = PromptUnit("prompt-000", "the digit 3")
METHOD: dict[str, Any] = {
    "preset": "s2q_quantsparse",
    "epochs": 1,
    "rotation_block": 16,
    "velocity_correction": True,
    "attention": {"density": 0.6, "dense_steps": 1, "interval": 2, "residual": {"rank": 4}},
}
PARTS = {
    "hunyuan_video_15": {"tokens_per_step": 0.5, "drift_repair": True},
    "wan_2_2": {"tokens_per_step": 0.5},
}
"""Of the method, where the family has them."""
STEPS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 16}
LONG_TEXT = {"hunyuan_video_15": 32}
"""Text tokens of pipelines that leave much of their instruction."""
KILLED = {"cogvideox_1_5", "hunyuan_video_15"}
"""Their runs are killed once, in the middle of the distillation."""


def settings_of(family: str) -> dict[str, Any]:
    return {**GENERATION[family], **STEPS, "max_sequence_length": LONG_TEXT.get(family, STEPS["max_sequence_length"])}


def generated(pipeline: Any, family: str) -> torch.Tensor:
    generation = Generation(**settings_of(family))
    return called(pipeline, PROMPT, generation, generator=torch.Generator().manual_seed(1), output_type="pt")


def kill_in_distillation(config: Path) -> None:
    """Begins a run in a process of its own, which is killed once a segment is there."""
    driver = subprocess.Popen(
        command("run", str(config)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while driver.poll() is None and not list(
            (config.parent / "run" / "cache" / "distillation").glob("*/record.json")
        ):
            time.sleep(0.05)
        assert driver.poll() is None, "the run has not ended by itself"
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.parametrize("family", GENERATION)
def test_a_run_ends_in_a_checkpoint_that_plain_diffusers_loads(family: str, tmp_path: Path) -> None:
    make: Callable[[Path], Path] = getattr(tiny_pipelines, family)
    model = make(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"the digit {i}\n" for i in range(3)))
    config = small_run(
        tmp_path,
        model=str(model),
        generation=settings_of(family),
        prompts={
            "calibration": str(tmp_path / "prompts.txt"),
            "num_calibration": 3,
            "held_out": str(tmp_path / "held_out.txt"),
            "num_held_out": 1,
        },
        selection={"num_samples": 2, "recorded_features": ["block_input", "latent"]},
        method={**METHOD, **PARTS.get(family, {})},
        evaluation={"films": family == "mochi", "velocity_prompts": 1},
    )
    if family in KILLED:
        kill_in_distillation(config)
    run = call("run", str(config))
    assert run.returncode == 0, run.stdout + run.stderr
    context = build_context(load_config(config))
    times = Recorded(tmp_path / "run").outputs.read("trajectories/prompt-000/timesteps").tolist()
    planned = context.model.noise_levels(STEPS["num_inference_steps"])
    assert [context.model.family.noise_level(time) for time in times] == pytest.approx(planned, abs=1e-6)
    assert planned == sorted(planned, reverse=True)
    films = list((tmp_path / "run" / "evaluation").glob("*.mp4"))
    assert {immeta(film, plugin="pyav")["fps"] for film in films} == ({30} if family == "mochi" else set())
    checkpoint = tmp_path / "run" / "checkpoint"
    verified = call("verify", str(checkpoint))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    pipeline = DiffusionPipeline.from_pretrained(str(checkpoint))
    pipeline.set_progress_bar_config(disable=True)
    roles, blocks = context.model.roles, context.model.blocks
    refined = Recorded(tmp_path / "run").records("refinement")
    assert len(refined) == len(roles)
    assert all(isinstance(record.result["velocity"]["error_after"], float) for record in refined)
    steps = [record.result["step"] for record in Recorded(tmp_path / "run").records("activations")]
    assert [sum(step in own for step in steps) for own in context.steps.values()] == [2] * len(roles)
    for role in roles:
        stored = json.loads((checkpoint / role / "config.json").read_text())["quantization_config"]
        assert set(stored["sparse_attention"]["head_kinds"]) == set(blocks)
        transformer = getattr(pipeline, role)
        inside = {name for name in quantized_layers(transformer) if name.startswith(tuple(blocks))}
        linears = {n for n, m in transformer.named_modules() if type(m) is torch.nn.Linear}
        assert inside
        assert not any(name.startswith(tuple(blocks)) for name in linears), "every linear of a block is quantized"
    video = generated(pipeline, family)
    assert bool(video.isfinite().all())
    assert torch.equal(video, generated(pipeline, family)), "a generation leaves nothing behind"
    pipeline.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(str(tmp_path / "again"))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(video, generated(again, family))
    for role in roles:
        sparse = getattr(pipeline, role).sparse_attention
        assert 0 < sparse.visited.density < 1
        sparse.enabled = False
    assert not torch.equal(video, generated(pipeline, family))
    exact = DiffusionPipeline.from_pretrained(str(model))
    exact.set_progress_bar_config(disable=True)
    error = (video - generated(exact, family)).norm() / video.norm()
    assert 0 < float(error) < 0.5


def test_a_distilled_model_runs_in_few_steps_without_guidance(tmp_path: Path) -> None:
    """HunyuanVideo-1.5's guider is told so; one call a step, protected by its noise level, and no step to cache for."""
    model = tiny_pipelines.hunyuan_video_15(tmp_path / "model")
    method = {
        "preset": "reelquant",
        "epochs": 1,
        "rotation_block": 16,
        "protected_steps": 1,
        "protected_activation_bits": 16,
    }
    generation = {**settings_of("hunyuan_video_15"), "guidance_scale": 1.0}
    config = small_run(
        tmp_path, model=str(model), generation=generation, method=method, bits={"weight": 4, "activation": 8},
        selection={"num_samples": 2, "recorded_features": ["latent"]}, evaluation={"films": False, "velocity_prompts": 1},
    )  # fmt: skip
    run = call("run", str(config))
    assert run.returncode == 0, run.stdout + run.stderr
    context = build_context(load_config(config))
    assert context.branches == ("cond",)
    written = [file.path for record in Recorded(tmp_path / "run").records("trajectories") for file in record.outputs]
    assert {path.split("/")[0] for path in written} >= {"cond", "latents"}
    assert not any(path.startswith("uncond") for path in written)
    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "run" / "checkpoint"))
    first, second, *_ = context.model.noise_levels(STEPS["num_inference_steps"])
    assert second <= pipeline.transformer.step_protection.protection.noise_above < first
    assert bool(called(pipeline, PROMPT, Generation(**generation), output_type="latent").isfinite().all())


def test_units_of_two_transformers_are_counted_before_they_are_listed(tmp_path: Path) -> None:
    model = tiny_pipelines.wan_2_2(tmp_path / "model")
    generation = {**GENERATION["wan_2_2"], **STEPS}
    config = load_config(small_run(tmp_path, model=str(model), generation=generation, method=METHOD))
    run = open_run(build_context(config), update=False)
    totals = {name: stage.total for name, stage in read_status(run.directory.location).stages.items()}
    assert totals["activations"] == 2 * config.selection.num_samples
    assert totals["refinement"] == 2
    assert totals == {name: stage.num_expected for name, stage in read_run(run.directory.location).stages.items()}


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("wan_2_2", {"width": 1056}, ("Wan", "3 x 8 x 132", "generation.width")),
        ("cogvideox_1_5", {"width": 64}, ("CogVideoX", "3 x 8 x 16", "generation.width")),
        ("cogvideox", {"max_sequence_length": 24}, ("generation.max_sequence_length", 24, 16, "CogVideoX")),
        ("cogvideox_1_5", {"num_frames": 12}, ("generation.num_frames", 12, "4 k + 1")),
    ],
)
def test_what_the_model_has_no_positions_for_is_named(
    family: str, changes: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    model = getattr(tiny_pipelines, family.removesuffix("_2_2"))(tmp_path / "model")
    generation = {**settings_of(family), **changes}
    plan = plan_config(
        load_config(small_run(tmp_path, model=str(model), generation=generation, method={"preset": "rtn"}))
    )
    assert names("\n".join(plan.problems), *expected)


def test_what_a_family_does_not_declare_is_refused(tmp_path: Path) -> None:
    model = tiny_pipelines.ltx_video(tmp_path / "model")
    method = {"preset": "s2q", "epochs": 1, "drift_repair": True, "tokens_per_step": 0.5}
    generation = {**GENERATION["ltx_video"], **STEPS}
    config = small_run(tmp_path, model=str(model), generation=generation, method=method)
    with raises(ConfigError, "drift_repair", "tokens_per_step", 0.5, "LTX-Video"):
        build_context(load_config(config))
