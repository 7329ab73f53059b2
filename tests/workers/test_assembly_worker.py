"""A checkpoint that is not sound is a ValueError, which the pool does not try again."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel

from reelquant.settings.generation import Numerics
from reelquant.settings.recipe import PRESETS
from tests.errors import raises
from tests.pipeline.small_run import files
from tests.reelquant.conftest import write_artifacts
from tests.unit_cache import UnitCache
from tests.workers.test_component_check import edit_tensors
from workers.assembly_worker import INDEX, AssemblyWorker
from workers.messages import AssembledTransformer, AssemblySettings, AssemblyUnit, MethodPlan, RunSource

RTN = PRESETS["rtn"]
BLOCK, LAYER, KEPT = "single_transformer_blocks.1", "proj_mlp", "x_embedder.proj.bias"
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def test_an_unsound_checkpoint_is_an_error_that_no_other_attempt_mends_and_replaces_none(
    digits_model: Path, tmp_path: Path
) -> None:
    run, model = UnitCache(tmp_path / "run"), tmp_path / "model"
    shutil.copytree(digits_model, model)
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(model / "transformer", torch_dtype=torch.bfloat16)
    [artifact] = write_artifacts(transformer, {BLOCK: [((LAYER,), 4, 6, "per_channel", False)]}, tmp_path)
    name = run.write_file("distillation", "s", artifact.name, lambda path: shutil.copy(artifact, path))
    worker = AssemblyWorker(AssemblySettings(RunSource(model, 0, Numerics("float32", 1)), 2**30))
    unit = AssemblyUnit(
        "rtn", MethodPlan(RTN, {}), "W4A6", {"transformer": AssembledTransformer((name,))}, "checkpoint"
    )
    assert run.do(worker, "assembly", unit).result["bits"] == "W4A6"
    before = files(run.run)
    assert f"checkpoint/{INDEX}" in before
    edit_tensors(model / WEIGHTS, lambda tensors: tensors[KEPT].fill_(torch.nan))  # while the next run was under way
    with raises(ValueError, KEPT):
        run.do(worker, "assembly", unit)
    assert files(run.run) == before
    config = run.run / "checkpoint" / "transformer" / "config.json"
    config.write_text("{}")  # somebody's own folder in its place
    with raises(ValueError, run.run / "checkpoint"):
        run.do(worker, "assembly", unit)
    assert config.read_text() == "{}"
