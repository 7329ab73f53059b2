"""Random checkpoints of other models than HunyuanVideo: diffusers opens them, and every weight is there and finite."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from benchmarks.random_checkpoint import models, write_pipeline
from tests.errors import names

TRANSFORMER = {"num_attention_heads": 1, "num_layers": 2, "ffn_dim": 64, "text_dim": 16}
VAE = {"base_dim": 4}
SMALL_VAE = {"block_out_channels": [32, 32, 32, 32, 32], "layers_per_block": 1}


@pytest.mark.parametrize("model", ["wan2.1-14b", "wan2.2-a14b"])
def test_a_pipeline_of_wan_generates(tmp_path: Path, model: str) -> None:
    assert write_pipeline(tmp_path, model, torch.device("cpu"), TRANSFORMER, VAE) == [2]
    pipe = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    transformers = [pipe.transformer] + ([pipe.transformer_2] if model == "wan2.2-a14b" else [])
    assert all(one is not None for one in transformers)
    assert all(torch.isfinite(weight).all() for one in transformers for weight in one.state_dict().values())
    size = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 8}
    latents = pipe("a train", **size, output_type="latent").frames
    assert latents.shape == (1, 16, 2, 2, 4)
    assert torch.isfinite(latents).all()


def test_a_pipeline_of_hunyuanvideo_1_5_generates(tmp_path: Path) -> None:
    transformer = {"num_attention_heads": 1, "num_layers": 2, "text_embed_dim": 128, "text_embed_2_dim": 8}
    assert write_pipeline(tmp_path, "hunyuanvideo-1.5", torch.device("cpu"), transformer, SMALL_VAE) == [2]
    pipe = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 2}
    latents = pipe('a train called "seven"', **size, output_type="latent").frames
    assert latents.shape == (1, 32, 2, 2, 4)
    assert torch.isfinite(latents).all()


def test_a_pipeline_without_text_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (names says what it must name)
        write_pipeline(tmp_path, "mochi", torch.device("cpu"), {}, {})
    assert names(str(raised.value), "MochiPipeline", "mochi")
    assert not list(tmp_path.iterdir())
    assert {"hunyuanvideo-13b", "hunyuanvideo-1.5", "wan2.1-14b"} <= set(models())
    assert "mochi" not in models()
