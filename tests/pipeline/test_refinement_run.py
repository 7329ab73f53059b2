"""A whole run with drift repair and velocity correction, beside the same method without them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file

from pipeline.config.loading import load_config
from pipeline.event_log import read_events
from pipeline.plan import plan_config
from pipeline.run_state import read_status
from reelquant.checkpoint.verify import verify_checkpoint
from reelquant.quantization.linear import QuantizedLinear
from tests.pipeline.small_run import ROOT, Recorded, call, small_run, write_report_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def narrow_model(folder: Path) -> Path:
    """The small model with a random transformer of four narrow blocks."""
    model = Path(shutil.copytree(ROOT / "assets" / "hunyuanvideo-digits", folder / "model"))
    config = json.loads((model / "transformer" / "config.json").read_text())
    config.update(
        num_attention_heads=2, attention_head_dim=16, rope_axes_dim=[4, 6, 6], num_layers=2, num_single_layers=2
    )
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel.from_config(config)
    transformer.to(torch.bfloat16).save_pretrained(model / "transformer")
    return model


@pytest.fixture(scope="module")
def refined_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refined")
    method = {"preset": "rtn", "name": "refined", "drift_repair": True, "velocity_correction": True}
    path = small_run(
        folder,
        model=str(narrow_model(folder)),
        bits={"weight": 3, "activation": 6},
        method=method,
        compare=["rtn"],
        distillation={"segment_length": 2},
        selection={"num_samples": 6},
    )
    (folder / "calibration.txt").write_text("".join(f"the digit {i} moving left\n" for i in range(4)))
    config = yaml.safe_load(path.read_text())
    config["prompts"]["num_calibration"] = 4
    path.write_text(yaml.safe_dump(config))
    done = call("run", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_checkpoint_has_what_was_refined(refined_run: Path) -> None:
    run = refined_run / "run"
    record = Recorded(run).read("refinement", "refined")
    assert record is not None
    assert Recorded(run).read("refinement", "rtn") is None
    repaired = [Recorded(run).file(f"refinement/refined/{output.path}") for output in record.outputs]
    assert repaired
    assert verify_checkpoint(run / "checkpoint").problems == []
    loaded = HunyuanVideoTransformer3DModel.from_pretrained(
        run / "checkpoint" / "transformer", torch_dtype=torch.float32
    )
    plain = load_file(run / "checkpoints" / "rtn" / "transformer" / "diffusion_pytorch_model.safetensors")
    changed = 0
    for path in repaired:
        for name, tensor in load_file(path).items():
            layer, _, suffix = name.rpartition(".")
            module = loaded.get_submodule(layer)
            assert isinstance(module, QuantizedLinear)
            assert torch.equal(getattr(module, suffix), tensor.to(getattr(module, suffix).dtype)), name
            changed += not torch.equal(plain[name], tensor)
    assert changed >= len(repaired)
    config = json.loads((run / "checkpoint" / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["velocity_correction"] == record.result["velocity_correction"]
    other = json.loads((run / "checkpoints" / "rtn" / "transformer" / "config.json").read_text())
    assert other["quantization_config"]["velocity_correction"] is None


def test_plan_status_and_report_know_the_stage(refined_run: Path) -> None:
    run = refined_run / "run"
    stages = {stage.name: stage for stage in plan_config(load_config(refined_run / "run.yaml")).stages}
    status = read_status(run).stages
    assert {name: stage.total for name, stage in status.items()} == {name: s.units for name, s in stages.items()}
    assert {name: stage.done for name, stage in status.items()} == {name: s.units for name, s in stages.items()}
    assert (stages["refinement"].units, stages["activations"].units) == (1, 6)
    record = Recorded(run).read("refinement", "refined")
    assert record is not None
    written = sum(load_bytes(Recorded(run).file(f"refinement/refined/{output.path}")) for output in record.outputs)
    assert written <= stages["refinement"].disk_bytes
    assert stages["refinement"].peak_memory_bytes == pytest.approx(record.peak_memory_bytes, rel=0.4)
    text = re.sub(r"<[^>]+>", " ", write_report_of(run).read_text())
    assert "Drift of the whole model" in text
    assert f"of {len(record.result['drift'])} blocks changed" in text
    assert "Velocity correction:" in text


def load_bytes(path: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(path).values())


def test_damaged_repair_is_redone_and_gives_the_same_bytes(refined_run: Path) -> None:
    run = refined_run / "run"
    record = Recorded(run).read("refinement", "refined")
    assert record is not None
    name = f"refinement/refined/{record.outputs[0].path}"
    path = Recorded(run).file(name)
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    done = call("run", str(refined_run / "run.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refinement/refined is redone" in done.stdout
    assert Recorded(run).file(name).read_bytes() == content
    finished = [e["stage"] for e in read_events(run) if e["event"] == "unit_finished"]
    assert (finished.count("refinement"), finished.count("assembly")) == (2, 2)
