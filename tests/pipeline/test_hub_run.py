"""A run on a model of the Hub that has nothing but a variant's weight files, up to its plain checkpoint."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants

from pipeline.config.loading import load_config
from pipeline.context import build_context
from pipeline.runner import open_run
from reelquant.checkpoint.verify import verify_checkpoint
from tests.hub_server import HubServer
from tests.pipeline.small_run import call, small_run

MODEL = "maker/digits"


@pytest.mark.ray
def test_every_worker_takes_the_recorded_commit_and_the_variant_and_the_checkpoint_is_plain(
    digits_model: Path, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run, cache = tmp_path / "model", tmp_path / "run", tmp_path / "cache of the workers"
    source = DiffusionPipeline.from_pretrained(str(digits_model), local_files_only=True, dtype=torch.bfloat16)
    source.save_pretrained(str(model), variant="bf16", max_shard_size="4MB")
    (model / "README.md").write_text("what no loader reads")
    repository = hub.repository(MODEL)
    commit = repository.commit(model)
    generation = {"height": 32, "width": 48, "num_frames": 1, "num_inference_steps": 2, "max_sequence_length": 24}
    config = small_run(
        tmp_path,
        model=MODEL,
        model_variant="bf16",
        generation=generation,
        selection={"num_samples": 1},
        method={"preset": "rtn", "drift_repair": True, "velocity_correction": True},
    )
    open_run(build_context(load_config(config), weights=False), update=False)  # a driver that ended at once
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    shutil.rmtree(moved / "vae")
    later = repository.commit(moved)

    monkeypatch.setenv("HF_HUB_CACHE", str(cache))  # this process has read its own already
    done = call("run", str(config), "--until", "assembly")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(text in done.stdout for text in (MODEL, commit, later))
    downloads = Counter(hub.downloads(MODEL))
    assert set(downloads.values()) == {2}, "once for this process, which plans and checks, and once for all workers"
    for place in (cache, Path(constants.HF_HUB_CACHE)):
        assert [path.name for path in place.glob("models--*/snapshots/*")] == [commit]
        assert not list(place.rglob("README.md"))

    checkpoint = run / "checkpoint"
    report = verify_checkpoint(checkpoint)
    assert (report.problems, report.not_covered) == ([], ())
    calibration = json.loads((checkpoint / "transformer" / "config.json").read_text())["quantization_config"][
        "calibration"
    ]
    assert (calibration["model"], calibration["model_commit"]) == (MODEL, commit)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert [path for path in files if "bf16" in path.name or path.is_symlink()] == []
    loaded = DiffusionPipeline.from_pretrained(str(checkpoint), local_files_only=True, dtype=torch.bfloat16)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        kept = getattr(source, name).state_dict()
        assert all(torch.equal(tensor, kept[key]) for key, tensor in getattr(loaded, name).state_dict().items())
