"""Every stage of the Wan digits model runs, and what it is trained on is what the prompts say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tools.train_wan_digits import main
from tools.wan_digits.acceptance import BARS, table
from tools.wan_digits.autoencoder import at_once, moments
from tools.wan_digits.components import make_transformer, make_vae
from tools.wan_digits.distillation import Trajectories, distill, few_step_scheduler, velocity
from tools.wan_digits.evaluation import score
from tools.wan_digits.rendering import Renderer, hands, path
from tools.wan_digits.scenes import SIZES, prompt, prompt_scenes
from tools.wan_digits.settings import Clip, Settings, smoke
from tools.wan_digits.text import Embedder, make_text_encoder, make_tokenizer, token_ids
from workers.recognition import DigitRecognizer, expected_digits

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["text", "vae", "transformer", "assemble", "check", "distill"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which every stage ran at the smallest size."""
    root = tmp_path_factory.mktemp("wan-digits")
    (root / "assets").mkdir()
    (root / "assets/digit-recognizer").symlink_to(ROOT / "assets/digit-recognizer")
    main([*STAGES, "--preset", "smoke", "--root", str(root), "--run", str(root / "run")])
    return root


def test_the_folder_is_a_plain_pipeline(made: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(made / "assets/wan-digits")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "WanPipeline"
    scene = prompt_scenes(1, "held_out")[0]
    frames = pipe(prompt(scene), height=32, width=48, num_frames=5, num_inference_steps=2, output_type="pt",
                  max_sequence_length=48).frames  # fmt: skip
    assert frames.shape == (1, 5, 3, 32, 48)
    assert torch.isfinite(frames).all()
    index = json.loads((made / "assets/wan-digits/model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert pipe.vae.config.latents_std != [1.0] * 16
    assert not list(made.rglob("*.partial"))
    assert len((made / "configs/prompts/wan_digits_held_out.txt").read_text().splitlines()) == 64


def test_what_cannot_be_assembled_leaves_the_asset(made: Path, tmp_path: Path) -> None:
    asset = made / "assets/wan-digits/model_index.json"
    before = asset.read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["assemble", "--preset", "smoke", "--root", str(made), "--run", str(tmp_path)])
    assert "average.safetensors" in str(stopped.value)
    assert asset.read_text() == before
    for budget in ("nan", "-1", "inf"):
        with pytest.raises(SystemExit):
            main(["transformer", "--run", str(tmp_path), "--budget-s", budget])


def test_the_lines_of_acceptance_are_measured(made: Path, tmp_path: Path) -> None:
    arguments = ["--preset", "smoke", "--root", str(made), "--run", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["accept", *arguments])
    main(["accept", *arguments, "--quantized", str(made / "assets/wan-digits")])
    found = json.loads((tmp_path / "acceptance.json").read_text())
    assert found["lines"].keys() == found["met"].keys() == BARS.keys()
    assert found["rtn_psnr_db"] == [200.0, 200.0], "the same model"
    assert found["lines"]["shift"] == found["lines"]["forks"] == 0
    assert 0.1 < found["strongest_tenth_by_block"][0] < 1
    assert found["lines"]["denoised"] > 0
    assert all(value > 30 for value in found["noise_floor_db"])
    assert "| forks | 0.02 | 0.0000 | met |" in table(found)


def test_a_student_learns_the_teachers_trajectories(made: Path) -> None:
    """From any latents of them its steps lead to the next ones, by the scheduler that its folder has."""
    settings = replace(smoke(), call_steps=60, student_lr=1e-2, warmup=1)
    tokenizer = make_tokenizer()
    encoder = make_text_encoder(settings, len(tokenizer))
    teacher, student = make_transformer(settings), make_transformer(settings)
    for parameter in teacher.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        pool = Trajectories(
            teacher.requires_grad_(False), Embedder(settings, tokenizer, encoder), settings, settings.small
        )
        x, timestep, text, target = pool.draw()
        before = float((velocity(student, x, timestep, text, settings) - target).norm() / target.norm())
    scheduler = few_step_scheduler(settings)
    scheduler.set_timesteps(settings.student_steps)
    latents = pool.latents.float()
    for step, time in enumerate(scheduler.timesteps):
        velocities = (latents[step + 1] - latents[step]) / (pool.sigmas[step + 1] - pool.sigmas[step])
        moved = scheduler.step(velocities, time, latents[step], return_dict=False)[0]
        torch.testing.assert_close(moved, latents[step + 1], rtol=1e-3, atol=1e-3)
    distill(student, (pool,), settings)
    with torch.no_grad():
        after = float((velocity(student, x, timestep, text, settings) - target).norm() / target.norm())
    assert after < 0.5 * before


def test_the_folder_of_few_steps_is_a_plain_pipeline(made: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(made / "run/few-step")
    pipe.set_progress_bar_config(disable=True)
    scene = prompt_scenes(1, "held_out")[0]
    call = {"height": 32, "width": 48, "num_frames": 5, "output_type": "pt", "max_sequence_length": 48}
    frames = pipe(prompt(scene), num_inference_steps=2, guidance_scale=1.0, **call).frames
    assert torch.isfinite(frames).all()
    assert pipe.scheduler.config.solver_order == 1
    teacher, student = (load_file(next((made / folder / "transformer").glob("*.safetensors")))
                        for folder in ("assets/wan-digits", "run/few-step"))  # fmt: skip
    assert any(not torch.equal(teacher[name], student[name]) for name in teacher)


def test_training_goes_on_from_its_files(made: Path) -> None:
    state = made / "run/transformer.safetensors"
    before = load_file(state)
    main(["transformer", "--preset", "smoke", "--root", str(made), "--run", str(made / "run")])
    after = load_file(state)
    assert int(after["steps"]) == 2 * int(before["steps"]) > 0
    assert float(after["elapsed_s"]) > float(before["elapsed_s"])
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("blocks."))


def test_training_starts_from_the_published_model(made: Path, tmp_path: Path) -> None:
    main(["start", "--preset", "smoke", "--root", str(made), "--run", str(tmp_path)])
    run = made / "run"
    for name in ("text_encoder", "vae"):
        old, new = (load_file(folder / f"{name}.safetensors") for folder in (run, tmp_path))
        assert old.keys() == new.keys()
        assert all(torch.allclose(old[key].float(), new[key].float()) for key in old), name
    state = load_file(tmp_path / "transformer.safetensors")
    assert float(state["elapsed_s"]) == 0
    published = load_file(next((made / "assets/wan-digits/transformer").glob("*.safetensors")))
    assert all(torch.equal(published[name], state[name]) for name in published)
    arguments = ["--preset", "smoke", "--root", str(made), "--run", str(tmp_path)]
    main(["transformer", *arguments, "--horizon-s", "60", "--lr", "1e-3"])
    assert int(load_file(tmp_path / "transformer.safetensors")["steps"]) == smoke().call_steps


def test_a_clip_at_once_is_what_diffusers_makes_of_it_in_chunks() -> None:
    torch.manual_seed(0)
    vae = make_vae(smoke()).double()
    video = torch.randn(2, 3, 13, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = vae.encode(video).latent_dist.mode()
        decoded = vae.decode(expected).sample
        with at_once():
            mean, _ = moments(vae, video)
            torch.testing.assert_close(mean, expected.float())
            torch.testing.assert_close(vae.decoder(vae.post_quant_conv(expected)).clamp(-1, 1), decoded)


def test_rendered_clips_show_what_their_prompts_say() -> None:
    clip, scenes = Settings().small, prompt_scenes(12, "held_out")
    video = Renderer(hands())(torch.tensor(scenes), clip, torch.Generator().manual_seed(0))
    videos = video.permute(0, 2, 3, 4, 1) / 2 + 0.5
    recognizer = DigitRecognizer(ROOT / "assets/digit-recognizer")
    read, moved, _ = score(videos, scenes, recognizer, clip)
    assert (read, moved) == (1.0, 1.0)
    elsewhere = [[*scene[:3], (scene[3] + 8) % 16, *scene[4:]] for scene in scenes]
    assert score(videos, elsewhere, recognizer, clip)[1] < 0.5
    assert expected_digits(prompt(scenes[0])) == (scenes[0][0], scenes[0][6])


def test_digits_stay_in_their_halves() -> None:
    clip = Clip(61, 128, 128, 40, 1)
    columns = torch.cartesian_prod(*(torch.arange(size) for size in SIZES[3:]))
    columns = torch.cat([torch.zeros(len(columns), 3, dtype=torch.long), columns], dim=1)
    for slot in (0, 1):
        x, y = path(columns, slot, clip)
        torch.testing.assert_close(torch.stack([x.min(), x.max()]), torch.tensor([20.0, 44.0]) + 64 * slot)
        torch.testing.assert_close(torch.stack([y.min(), y.max()]), torch.tensor([20.0, 108.0]))


def test_every_prompt_has_the_same_number_of_known_tokens() -> None:
    tokenizer = make_tokenizer()
    ids = token_ids(tokenizer, torch.tensor(prompt_scenes(200, "calibration")))
    assert (ids[:, -1] == tokenizer.eos_token_id).all()
    assert not (ids == tokenizer.unk_token_id).any()
