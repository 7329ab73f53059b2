"""Runs of models that make a video from an image, from tiny random pipelines: planned, killed, finished, loaded, generating."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import reelquant  # noqa: F401
from pipeline.config.loading import ConfigError, load_config
from pipeline.plan import plan_config
from reelquant.checkpoint.reader import quantized_layers
from reelquant.families.family import family_of_architecture
from reelquant.settings.generation import Generation, Numerics
from tests.errors import names, raises
from tests.pipeline.small_run import Recorded, call, small_run
from tests.pipeline.test_family_runs import METHOD, kill_in_distillation
from tests.pipeline.test_prompts import fingerprints, image, run_of, write_lines
from tests.reelquant.families import tiny_pipelines
from tests.unit_cache import UnitCache
from workers.activation_worker import ActivationWorker
from workers.messages import ActivationSettings, PromptUnit, RunSource, SampleUnit, TrajectorySettings
from workers.pipeline_call import called
from workers.stored_calls import StoredConstants
from workers.trajectory_worker import TrajectoryWorker
from workers.velocity_watch import transformers

GENERATION: dict[str, Any] = {
    "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 16,
}  # fmt: skip
TEXT = {
    "wan_2_1_i2v": 512,
    **dict.fromkeys(("hunyuan_video_15_i2v", "hunyuan_video_i2v", "hunyuan_video_i2v_concat"), 32),
}
"""Text tokens of models that take so many only, or leave much of their instruction."""
DENSITY = {
    "hunyuan_video_i2v": 0.98,
    "hunyuan_video_i2v_concat": 0.99,
    "hunyuan_video_15_i2v": 0.7,
    "cogvideox_1_5_i2v": 0.9,
    "cogvideox_5b_i2v": 0.8,
}
"""Of models whose text and image are more of the map."""
PARTS = {
    "hunyuan_video_i2v": {"tokens_per_step": 0.5},
    "hunyuan_video_i2v_concat": {"tokens_per_step": 0.5, "drift_repair": True},
}
"""Of the method, where the model has them."""
ONE_PASS = ("hunyuan_video_i2v", "hunyuan_video_i2v_concat")
"""Models without an unconditional pass, for which there are negative prompts."""
MODELS = {
    "wan_2_1_i2v": 12,
    "wan_2_2_i2v": 10,
    "wan_ti2v": 10,
    "hunyuan_video_15_i2v": 14,
    "cogvideox_1_5_i2v": 8,
    "hunyuan_video_i2v": 14,
    "hunyuan_video_i2v_concat": 14,
}
"""Linears of a block; of HunyuanVideo's single-stream blocks there are 6."""
KILLED = ("wan_ti2v", "hunyuan_video_i2v")
"""Their runs are killed once, in the middle of the distillation; those of the others in tests that are slow."""


def generation_of(model: str) -> dict[str, Any]:
    size = {"height": 32, "width": 48 if model != "ltx_video" else 64} if model.startswith(("cogvideox", "ltx")) else {}
    return {**GENERATION, **size, "max_sequence_length": TEXT.get(model, GENERATION["max_sequence_length"])}


def image_run(folder: Path, model: str, **changes: Any) -> Path:
    """The configuration of a run with three images for the calibration and another one held out."""
    for index, color in enumerate(("red", "green", "blue", "white")):
        image(folder / "images" / f"{index}.png", (192, 128), color)
    # Words in quotes are a text of their own for HunyuanVideo-1.5.
    texts = [f'the digit {index} called "number {index}"' for index in range(4)]
    lines = [{"prompt": text, "image": f"images/{index}.png"} for index, text in enumerate(texts)]
    negative = {} if model in ONE_PASS else {"negative_prompt": "blurred"}
    write_lines(folder / "calibration.jsonl", *lines[:2], {**lines[2], **negative})
    write_lines(folder / "held_out.jsonl", lines[3])
    return small_run(
        folder,
        model=str(getattr(tiny_pipelines, model)(folder / "model")),
        generation=generation_of(model),
        prompts={
            "calibration": str(folder / "calibration.jsonl"),
            "num_calibration": 3,
            "held_out": str(folder / "held_out.jsonl"),
            "num_held_out": 1,
        },
        selection={"num_samples": 2, "recorded_features": ["block_input", "latent"]},
        method={
            **METHOD,
            **PARTS.get(model, {}),
            "attention": {**METHOD["attention"], "density": DENSITY.get(model, 0.6)},
        },
        evaluation={"films": False, "velocity_prompts": 1},
        **changes,
    )


def generated(pipeline: Any, model: str, image: Path | None) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    prompt = PromptUnit("p", "the digit 3", None, None if image is None else image.read_bytes())
    generation = Generation(**generation_of(model))
    return called(pipeline, prompt, generation, generator=torch.Generator().manual_seed(1), output_type="pt")


@pytest.mark.ray
@pytest.mark.parametrize(
    ("model", "killed"),
    [
        ("wan_2_1_i2v", False),
        ("wan_2_2_i2v", False),
        ("wan_ti2v", True),
        ("hunyuan_video_15_i2v", False),
        ("cogvideox_1_5_i2v", False),
        ("hunyuan_video_i2v", True),
        ("hunyuan_video_i2v_concat", False),
        *(pytest.param(model, True, marks=pytest.mark.slow) for model in MODELS if model not in KILLED),
    ],
)
def test_a_run_ends_in_a_checkpoint_that_plain_diffusers_loads(model: str, killed: bool, tmp_path: Path) -> None:
    config = image_run(tmp_path, model)
    if killed:
        kill_in_distillation(config)
    run = call("run", str(config))
    assert run.returncode == 0, run.stdout + run.stderr
    recorded = Recorded(tmp_path / "run")
    planned = {stage.name: stage.disk_bytes for stage in plan_config(load_config(config)).stages}
    # How long the empty prompt is without padding, no plan knows.
    most = 1.01 if model.startswith("hunyuan") else 1
    for stage in ("trajectories", "activations"):
        written = sum(file.num_bytes for record in recorded.records(stage) for file in record.outputs)
        assert written <= planned[stage] <= most * written, stage
    noise = recorded.outputs.read("trajectories/prompt-000/timesteps").tolist()
    assert noise == sorted(noise, reverse=True)
    assert noise[0] > 900
    assert call("verify", str(tmp_path / "run" / "checkpoint")).returncode == 0
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "run" / "checkpoint"))
    for transformer in transformers(pipeline):
        assert transformer.sparse_attention.spec.dense_frames == 1, "an image's frame is kept whole"
        family = family_of_architecture(type(transformer).__name__)
        for name in family.block_names(transformer.config):
            block = transformer.get_submodule(name)
            inside = [layer for layer in quantized_layers(transformer) if layer.startswith(f"{name}.")]
            assert len(inside) == (6 if name.startswith("single") else MODELS[model])
            assert not [name for name, module in block.named_modules() if type(module) is torch.nn.Linear]
    red, green = (tmp_path / "images" / f"{index}.png" for index in range(2))
    video = generated(pipeline, model, red)
    assert bool(video.isfinite().all())
    assert not torch.equal(video, generated(pipeline, model, green)), "it sees the image"
    pipeline.save_pretrained(tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "again"))
    assert torch.equal(video, generated(again, model, red))
    if model == "wan_ti2v":  # one model, two pipelines
        from_text = diffusers.WanPipeline.from_pretrained(str(tmp_path / "run" / "checkpoint"))
        assert generated(from_text, model, None).shape == video.shape
    exact = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "model"))
    assert 0 < float((video - generated(exact, model, red)).norm() / video.norm()) < 0.5


@pytest.mark.parametrize(("from_image", "num_distinct"), [(False, 1), (True, 2)])
def test_one_model_makes_videos_from_text_and_from_images(from_image: bool, num_distinct: int, tmp_path: Path) -> None:
    """Wan2.2-TI2V-5B: all tokens of a step have one timestep, or those of the image's frame another one."""
    model = tiny_pipelines.wan_ti2v(tmp_path / "model", image=from_image)
    content = image(tmp_path / "a.png").read_bytes() if from_image else None
    prompt = PromptUnit("prompt-000", "the digit 3", "blurred", content)
    source, generation = RunSource(model, 0, Numerics("float32", 1)), Generation(**GENERATION)
    cache = UnitCache(tmp_path / "run")
    cache.do(TrajectoryWorker(TrajectorySettings(source, generation, 4, 16)), "trajectories", prompt)
    worker = ActivationWorker(ActivationSettings(source, generation, ("blocks.0",)))
    cache.do(worker, "activations", SampleUnit("sample", prompt.name, 1))
    num_tokens, width = 3 * 4 * 6, 48
    for branch in ("cond", "uncond"):
        timesteps = cache.outputs.read(f"trajectories/{prompt.name}/{branch}/timestep")
        assert timesteps.shape == (4, 1, num_tokens)
        assert [len(own.unique()) for own in timesteps] == [num_distinct] * 4
        assert torch.equal(timesteps.amax(dim=(1, 2)), cache.outputs.read(f"trajectories/{prompt.name}/timesteps"))
        constants = StoredConstants(torch.device("cpu")).read(cache.outputs, f"activations/sample/{branch}")
        assert cache.outputs.read(f"activations/sample/{branch}/blocks.temb.0").shape == (1, num_distinct, 6, width)
        assert constants.layout.dense_frames == int(from_image)
        temb = constants.arguments("blocks.0")["temb"]
        assert temb.shape == (1, num_tokens, 6, width)
        like_the_first = (temb[0] == temb[0, :1]).flatten(1).all(dim=1)
        assert torch.equal(like_the_first, timesteps[1, 0] == timesteps[1, 0, 0])


def test_a_run_depends_on_its_images(tmp_path: Path) -> None:
    model = tiny_pipelines.wan_ti2v(tmp_path / "model")
    lines = [{"prompt": "a", "image": "a.png"}, {"prompt": "a", "image": "h.png"}]
    image(tmp_path / "a.png", color="red")
    image(tmp_path / "h.png", color="blue")
    found = [fingerprints(run_of(tmp_path, model, *lines, generation=GENERATION))]
    image(tmp_path / "a.png", color="green")
    found.append(fingerprints(run_of(tmp_path, model, *lines, generation=GENERATION)))
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1], "of its own image alone"
    image(tmp_path / "h.png", color="green")
    with raises(ConfigError, "prompts.held_out", "a", "calibration"):
        run_of(tmp_path, model, *lines, generation=GENERATION)


def test_what_a_model_from_images_needs_is_named(tmp_path: Path) -> None:
    model = tiny_pipelines.wan_ti2v(tmp_path / "model")
    image(tmp_path / "wide.png", (200, 100))
    image(tmp_path / "h.png")
    image(tmp_path / "tall.png", (60, 80))
    lines = [
        {"prompt": "a", "image": "wide.png"}, {"prompt": "b"}, {"prompt": "d", "image": "h.png"},
        {"prompt": "e", "image": "tall.png"}, {"prompt": "c", "image": "h.png"},
    ]  # fmt: skip
    evaluation = {"prompts_per_pass": 2}
    with pytest.raises(ConfigError) as caught:
        run_of(tmp_path, model, *lines, generation=GENERATION, evaluation=evaluation)
    lacking, stretched, several = caught.value.problems
    assert "line 2" in lacking
    assert "WanImageToVideoPipeline" in lacking
    assert ".jsonl" in lacking
    assert names(stretched, "prompts.calibration", "generation.height", "96 x 64")
    assert names(stretched, "line 1", tmp_path / "wide.png", "200 x 100", 1.33)
    assert names(stretched, "line 4", tmp_path / "tall.png", "60 x 80", "2.00")
    assert "line 3" not in stretched
    assert "evaluation.prompts_per_pass" in several


def test_the_pipeline_that_makes_videos_from_images_is_named(tmp_path: Path) -> None:
    """Wan2.2-TI2V-5B comes with the one from text."""
    image(tmp_path / "a.png")
    lines = [{"prompt": "a", "image": "a.png"}, {"prompt": "b"}]
    model = tiny_pipelines.wan_ti2v(tmp_path / "model", image=False)
    words = ("prompts.calibration", "line 1", model / "model_index.json", "_class_name", "WanImageToVideoPipeline")
    with raises(ConfigError, "WanPipeline", *words):
        run_of(tmp_path, model, *lines, generation=GENERATION)


@pytest.mark.parametrize("model", ["wan_ti2v", "hunyuan_video_i2v", "hunyuan_video_i2v_concat"])
def test_the_image_is_not_all_of_the_video(model: str, tmp_path: Path) -> None:
    """Where nothing is made of the image's frame; 5 frames are two of the latents."""
    config = image_run(tmp_path, model)
    overrides = ["method.attention.density=1", "method.attention_distillation=none"]
    with raises(ConfigError, "generation.num_frames", 4, 5):
        plan_config(load_config(config, ["generation.num_frames=4", *overrides]))
    assert plan_config(load_config(config, ["generation.num_frames=5", *overrides])).problems == []


def test_a_model_that_makes_the_image_s_frame_too_makes_it_alone(tmp_path: Path) -> None:
    overrides = ["generation.num_frames=1", "method.attention.density=1", "method.attention_distillation=none"]
    assert plan_config(load_config(image_run(tmp_path, "wan_2_2_i2v"), overrides)).problems == []


@pytest.mark.parametrize(("model", "pipeline"), [("wan", "WanImageToVideoPipeline"), ("wan_2_2_i2v", "WanPipeline")])
def test_a_pipeline_that_is_not_its_transformers_is_refused(model: str, pipeline: str, tmp_path: Path) -> None:
    folder: Path = getattr(tiny_pipelines, model)(tmp_path / "model")
    index = folder / "model_index.json"
    text = index.read_text()
    index.write_text(text.replace("WanPipeline", pipeline).replace("WanImageToVideoPipeline", pipeline))
    with raises(ConfigError, "model_index.json", pipeline, "image"):
        plan_config(load_config(small_run(tmp_path, model=str(folder), generation=GENERATION)))


def test_gates_of_two_kinds_of_tokens_are_not_repaired(tmp_path: Path) -> None:
    config = image_run(tmp_path, "hunyuan_video_i2v")
    with raises(ConfigError, "drift_repair", "HunyuanVideo", "gate"):
        plan_config(load_config(config, ["method.drift_repair=true"]))


def test_text_tokens_of_a_model_that_takes_a_fixed_number(tmp_path: Path) -> None:
    plan = plan_config(load_config(image_run(tmp_path, "wan_2_1_i2v"), ["generation.max_sequence_length=64"]))
    [problem] = [problem for problem in plan.problems if "generation.max_sequence_length" in problem]
    assert "64" in problem
    assert "512" in problem


def test_a_model_with_positions_for_one_size_names_it(tmp_path: Path) -> None:
    config = image_run(tmp_path, "cogvideox_5b_i2v")
    assert not plan_config(load_config(config)).problems
    plan = plan_config(load_config(config, ["generation.height=64", "generation.width=96"]))
    [problem] = [problem for problem in plan.problems if "generation.height" in problem]
    assert names(problem, "generation.width", 64, 96, "CogVideoX", 32, 48)
    plan = plan_config(load_config(config, ["generation.num_frames=5"]))
    [problem] = [problem for problem in plan.problems if "generation.num_frames" in problem]
    assert names(problem, 5, "CogVideoX", 9)


@pytest.mark.parametrize("num_words", [0, 20])
def test_a_band_has_room_beside_all_text_and_the_image(num_words: int, tmp_path: Path) -> None:
    """HunyuanVideo-1.5: tokens of the image's encoder, and letters of words in quotes."""
    config = image_run(tmp_path, "hunyuan_video_15_i2v")
    line = {"prompt": f'a sign "{"word " * num_words}"', "image": "images/0.png"}
    write_lines(tmp_path / "calibration.jsonl", *(line for _ in range(3)))
    plan = plan_config(load_config(config, ["method.attention.density=0.5"]))
    [problem] = [problem for problem in plan.problems if "density" in problem]
    num_text = plan.counts.longest.num_all_text + 4
    assert names(problem, "method", "attention.density", 0.5, num_text, 96, 192)
    assert num_text > 4 + 100 * (num_words > 0)
