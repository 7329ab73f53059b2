"""A run on a model that has nothing but a variant's weight files and a component behind a link, up to its plain checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from reelquant.checkpoint.verify import verify_checkpoint
from tests.pipeline.small_run import call, small_run


@pytest.mark.ray
def test_every_worker_takes_the_variant_and_the_checkpoint_is_plain(digits_model: Path, tmp_path: Path) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    source = DiffusionPipeline.from_pretrained(str(digits_model), local_files_only=True, dtype=torch.bfloat16)
    source.save_pretrained(str(model), variant="bf16", max_shard_size="4MB")
    shutil.move(model / "vae", tmp_path / "shared")
    (model / "vae").symlink_to("../shared")
    generation = {"height": 32, "width": 48, "num_frames": 1, "num_inference_steps": 2, "max_sequence_length": 24}
    config = small_run(
        tmp_path,
        model=str(model),
        model_variant="bf16",
        generation=generation,
        selection={"num_samples": 1},
        method={"preset": "rtn", "drift_repair": True, "velocity_correction": True},
    )
    done = call("run", str(config), "--until", "assembly")
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = run / "checkpoint"
    report = verify_checkpoint(checkpoint)
    assert (report.problems, report.not_covered) == ([], ())
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert [path for path in files if "bf16" in path.name or path.is_symlink()] == []
    loaded = DiffusionPipeline.from_pretrained(str(checkpoint), local_files_only=True, dtype=torch.bfloat16)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        kept = getattr(source, name).state_dict()
        assert all(torch.equal(tensor, kept[key]) for key, tensor in getattr(loaded, name).state_dict().items())
