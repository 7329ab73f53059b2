"""Writes the tiny files of today's formats that later versions must still read: `python -m tools.make_fixtures FOLDER`.

FOLDER becomes a finished run of a random model, with all that it wrote but the report; its `checkpoint/` is a whole pipeline.
`latents.safetensors`, which is no part of a run, is what the checkpoint generates. Called once a format version, with the
code of the last commit that writes it; what it wrote goes to tests/fixtures and is never changed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from diffusers import (
    AutoencoderKLHunyuanVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

import reelquant  # noqa: F401 - teaches diffusers to load the checkpoint
from tools.digits.components import save_pipeline

ROOT = Path(__file__).resolve().parents[1]
TOKENIZERS = ROOT / "assets" / "hunyuanvideo-digits"
WIDTH = 16
SIZE = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 5, "max_sequence_length": 16}
PROMPT = "the digit 4 moving left"
METHOD = {
    "preset": "s2q_quantsparse", "epochs": 1, "rotation_block": 16, "pool_size": 8, "num_salient_tokens": 8,
    "attention": {
        "density": 0.5, "dense_steps": 2, "dense_layers": 1, "interval": 2,
        "residual": {"order": 2, "rank": 4, "extrapolation": "linear", "storage": "low_rank_int8"},
    },
    "protected_steps": 1, "drift_repair": True, "velocity_correction": True,
}  # fmt: skip


def main() -> None:
    """Make the model, compress it, and keep the run."""
    parser = argparse.ArgumentParser(description="Write the fixtures of today's formats.")
    parser.add_argument("folder", type=Path, help="new folder")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch) / "tiny")
        compress(Path(scratch))
        shutil.copytree(Path(scratch) / "run", folder, ignore=shutil.ignore_patterns("report.html", "run.lock"))
    torch.set_num_threads(1)
    save_file({"latents": latents(folder / "checkpoint")}, folder / "latents.safetensors")


def make_model(folder: Path) -> None:
    """A whole pipeline of random weights, a few kilobytes a part."""
    torch.manual_seed(0)
    text = {name: AutoTokenizer.from_pretrained(TOKENIZERS / name) for name in ("tokenizer", "tokenizer_2")}
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2}
    llama = LlamaConfig(vocab_size=70, num_hidden_layers=3, bos_token_id=2, eos_token_id=5, pad_token_id=0, **sizes)
    clip = CLIPTextConfig(
        vocab_size=23,
        num_hidden_layers=1,
        projection_dim=WIDTH,
        bos_token_id=3,
        eos_token_id=4,
        pad_token_id=0,
        **sizes,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    with torch.no_grad():  # what the blocks do is seen in the latents
        for name, parameter in transformer.named_parameters():
            parameter.mul_(4.0 if name.startswith("proj_out") else 2.0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )
    pipeline = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        text_encoder_2=CLIPTextModel(clip),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **text,
    )
    save_pipeline(pipeline, folder)


def compress(folder: Path) -> None:
    """Runs the whole job in `folder/run`, from `folder`: so that the record of the run has relative paths only."""
    (folder / "calibration.txt").write_text("".join(f"the digit {digit} moving up\n" for digit in range(4)))
    (folder / "held_out.txt").write_text("the digit 7 moving right\n")
    config = {
        "run": "run",
        "model": "tiny",
        "generation": SIZE,
        "prompts": {
            "calibration": "calibration.txt", "num_calibration": 4, "held_out": "held_out.txt", "num_held_out": 1
        },
        "selection": {"num_samples": 2},
        "method": METHOD,
        "bits": {"weight": 3, "activation": 6},
        "distillation": {"segment_length": 2},
        "evaluation": {"films": False},
        "workers": {"num_workers": 1},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.cli import app; app()"
    subprocess.run([sys.executable, "-c", program, "run", "run.yaml"], cwd=folder, check=True)


def latents(checkpoint: Path) -> torch.Tensor:
    """What the checkpoint generates in float32: `[1, 4, 2, 8, 12]`."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    frames: torch.Tensor = pipeline(PROMPT, **SIZE, generator=generator, output_type="latent").frames
    return frames


if __name__ == "__main__":
    main()
