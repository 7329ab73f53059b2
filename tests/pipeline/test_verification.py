"""`verify`: what is shown of a sound checkpoint, of a damaged one, and of what is none."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.verification import show_verification
from reelquant.checkpoint.file_digests import DIGESTS_NAME
from reelquant.checkpoint.layer_packing import pack_layer, write_block_artifact
from reelquant.checkpoint.verify import verify_checkpoint
from reelquant.checkpoint.writer import write_checkpoint
from reelquant.quantization.weight_grid import fit_per_channel

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(digits_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a few layers rounded to nearest. Read only."""
    folder = tmp_path_factory.mktemp("verify")
    tensors, specs = {}, {}
    names = [f"single_transformer_blocks.{i}.proj_out" for i in range(3)]
    names += ["transformer_blocks.0.attn.to_out.0", "norm_out.linear"]
    with safe_open(digits_model / WEIGHTS, framework="pt") as source:
        for name in names:
            weight = source.get_tensor(f"{name}.weight").float()
            grid = fit_per_channel(weight, 4)
            packed, specs[name] = pack_layer(name, codes=grid.round(weight), grid=grid, bias=None, activation_bits=16)
            tensors.update(packed)
    write_block_artifact(folder / "block.safetensors", tensors, specs)
    output = folder / "checkpoint"
    write_checkpoint(digits_model, output, artifacts=[folder / "block.safetensors"], bits="W4A16", method="rtn")
    return output


def shown(path: Path, width: int = 80) -> tuple[bool, str]:
    console = Console(width=width)
    with console.capture() as capture:
        sound = show_verification(path, console)
    return sound, capture.get()


def test_sound_checkpoint(checkpoint: Path) -> None:
    sound, text = shown(checkpoint)
    assert sound
    lines = [line.split() for line in text.splitlines()]
    assert ["single_transformer_blocks"] in lines  # blocks share a row
    assert ["proj_out", "W4A16", "3", "4.05", "273", "KiB"] in lines  # 3 (480 + 4 + 2) 192 bytes
    assert ["attn.to_out.0", "W4A16", "1", "4.25", "19.1", "KiB"] in lines
    assert ["linear", "W4A16", "1", "4.25", "38.2", "KiB"] in lines
    report = verify_checkpoint(checkpoint)
    assert f"{report.compression:.2f} times smaller" in text
    assert "sound: all tensors and digests of 5 quantized layers are right" in text
    assert f"all {report.num_files} files" in text


def test_flipped_bit_and_infinite_scale_are_both_named(checkpoint: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    tensors = load_file(own / WEIGHTS)
    tensors["single_transformer_blocks.1.proj_out.weight_packed"][0, 0] ^= 1
    tensors["norm_out.linear.weight_scale"][3] = torch.inf
    save_file(tensors, own / WEIGHTS, {"format": "pt"})
    sound, text = shown(own)
    assert not sound
    problems = [line for line in text.splitlines() if line.startswith("problem: ")]
    assert any("single_transformer_blocks.1.proj_out" in line and "digest" in line for line in problems)
    assert any("norm_out.linear.weight_scale" in line for line in problems)
    assert "sound:" not in text


@pytest.mark.parametrize("digests", [True, False])
def test_damaged_other_components(checkpoint: Path, tmp_path: Path, digests: bool) -> None:
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    (own / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (own / "text_encoder" / "model.safetensors").write_text("x")
    shutil.rmtree(own / "tokenizer_2")
    if not digests:
        (own / DIGESTS_NAME).unlink()
    sound, text = shown(own)
    assert not sound
    problems = [line for line in text.splitlines() if line.startswith("problem: ")]
    for named in ("vae", "text_encoder/model.safetensors", "tokenizer_2"):
        assert any(named in problem for problem in problems), named
    assert ("not covered: " in text) is not digests


def test_what_save_pretrained_writes_is_not_covered_but_sound(checkpoint: Path, tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(str(checkpoint), local_files_only=True).save_pretrained(str(tmp_path / "again"))
    sound, text = shown(tmp_path / "again")
    assert sound
    assert "not covered: " in text
    assert "text_encoder_2" in text


def test_truncated_file(checkpoint: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    (own / WEIGHTS).write_bytes((own / WEIGHTS).read_bytes()[:-100])
    sound, text = shown(own)
    assert not sound
    assert "problem: " in text
    assert "b/weight" not in text


def test_many_problems_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    tensors = load_file(own / WEIGHTS)
    save_file({name: tensors[name] for name in sorted(tensors)[100:]}, own / WEIGHTS, {"format": "pt"})
    sound, text = shown(own)
    assert not sound
    assert "problem: and 71 more" in text


def test_what_is_no_checkpoint(checkpoint: Path, digits_model: Path, tmp_path: Path) -> None:
    assert not shown(tmp_path / "nowhere")[0]
    sound, text = shown(digits_model)
    assert not sound
    assert "nothing is quantized" in text
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoint")
    sound, text = shown(run)
    assert not sound
    assert f"is a run directory; its checkpoints: {run / 'checkpoint'}" in text


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_is_cut_or_wrapped(checkpoint: Path, width: int) -> None:
    text = shown(checkpoint, width)[1]
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines() if "KiB" in line) <= 80
