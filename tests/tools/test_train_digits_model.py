"""Every stage of the digits model runs, and a resumed training equals an undisturbed one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, DiffusionPipeline
from safetensors.torch import load_file

from tools.digits.autoencoder import fast_padding
from tools.digits.captions import all_captions, prompt_sets, split_captions
from tools.digits.components import make_vae
from tools.digits.settings import smoke
from tools.train_digits_model import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which every stage ran at the smallest size."""
    root = tmp_path_factory.mktemp("digits")
    stages = ["text", "recognizer", "prompts", "vae", "latents", "transformer", "evaluate", "export", "assemble"]
    main([*stages, "check", "--preset", "smoke", "--root", str(root), "--run", str(root / "run")])
    return root


def test_every_stage_leaves_its_files(made: Path) -> None:
    assert (made / "run/evaluation.png").stat().st_size > 0
    assert (made / "assets/hunyuanvideo-digits.png").stat().st_size > 0
    assert len((made / "configs/prompts/digits_held_out.txt").read_text().splitlines()) == 64
    assert len((made / "configs/prompts/digits_calibration.txt").read_text().splitlines()) == 24
    assert not list(made.rglob("*.partial"))
    index = json.loads((made / "assets/hunyuanvideo-digits/model_index.json").read_text())
    assert index["tokenizer"] == index["tokenizer_2"] == ["transformers", "PreTrainedTokenizerFast"]


def test_the_folder_is_a_plain_pipeline(made: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(made / "assets/hunyuanvideo-digits")
    pipe.set_progress_bar_config(disable=True)
    prompt = "the digit 3 moving left and the digit 7 moving down"
    frames = pipe(prompt, height=32, width=48, num_frames=9, num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 9, 3, 32, 48)
    assert torch.isfinite(frames).all()


@pytest.mark.slow
def test_resumed_training_equals_an_undisturbed_one(made: Path) -> None:
    """The fixture ran six steps at once; here the same six run in two calls."""
    resumed = made / "resumed"
    resumed.mkdir()
    for name in ("vae.pt", "latents.pt"):
        (resumed / name).write_bytes((made / "run" / name).read_bytes())
    common = ["--preset", "smoke", "--root", str(made), "--run", str(resumed)]
    main(["transformer", *common, "--call-steps", "2"])
    assert torch.load(resumed / "transformer.pt", weights_only=True)["step"] == 2
    main(["transformer", "export", *common])
    for i in (0, 1):
        expected = load_file(made / f"run/export/transformer-{i}.safetensors")
        actual = load_file(resumed / f"export/transformer-{i}.safetensors")
        assert actual.keys() == expected.keys()
        differing = [name for name in expected if not torch.equal(actual[name], expected[name])]
        assert not differing


@pytest.mark.slow
def test_second_phase_starts_from_the_folder_and_keeps_its_latents(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "assets", tmp_path / "assets")
    folder = tmp_path / "assets/hunyuanvideo-digits"
    before = {name: load_file(folder / name / "diffusion_pytorch_model.safetensors") for name in ("vae", "transformer")}
    common = ["--preset", "narrow-smoke", "--root", str(tmp_path), "--run", str(tmp_path / "run")]
    main(["vae", "latents", "transformer", "export", "assemble", *common])
    after = {name: load_file(folder / name / "diffusion_pytorch_model.safetensors") for name in before}
    changed = {key for key, weight in before["vae"].items() if not torch.equal(weight, after["vae"][key])}
    assert changed
    assert all(key.startswith(("decoder.", "post_quant_conv.")) for key in changed)
    assert any(not torch.equal(weight, after["transformer"][key]) for key, weight in before["transformer"].items())


def test_concatenated_padding_changes_no_value() -> None:
    vae = make_vae(smoke())
    assert isinstance(vae, AutoencoderKLHunyuanVideo)
    video = torch.randn(1, 3, 5, 16, 16)
    with torch.no_grad():
        expected = vae(video).sample
        with fast_padding():
            actual = vae(video).sample
    assert torch.equal(actual, expected)


def test_held_out_prompts_are_never_trained_on() -> None:
    training = {str(c) for n in (1, 2) for c in split_captions(n)[0]}
    calibration, held_out = prompt_sets()
    assert {str(c) for c in calibration} <= training
    assert not {str(c) for c in held_out} & training
    assert len({str(c) for c in held_out}) == 64
    assert len(training) + sum(len(split_captions(n)[1]) for n in (1, 2)) == sum(len(all_captions(n)) for n in (1, 2))


def test_shipped_prompts_are_the_split() -> None:
    calibration, held_out = prompt_sets()
    for name, captions in (("calibration", calibration), ("held_out", held_out)):
        shipped = (ROOT / f"configs/prompts/digits_{name}.txt").read_text().splitlines()
        assert shipped == [str(c) for c in captions]
