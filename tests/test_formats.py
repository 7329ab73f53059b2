"""A run and its checkpoint as earlier versions wrote them (tools/make_fixtures.py) are read for two minor releases at least."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.report.page import write_report_of
from pipeline.run_state import read_status
from reelquant.checkpoint.verify import verify_checkpoint
from storage.manifest import Manifest
from storage.run_directory import RunDirectory
from tools.make_fixtures import latents

FIXTURES = Path(__file__).with_name("fixtures")
RUNS = sorted(path.name for path in FIXTURES.iterdir())
TOLERANCE = 5e-3
"""Of generated latents, relative; another vector width gives 1.3e-3, and leaving out the least section 1.7e-2."""
SECTIONS = ("velocity_correction", "step_protection", "sparse_attention")


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A copy of the fixture, which stays as it is."""
    name: str = request.param
    before = contents(FIXTURES / name)
    yield Path(shutil.copytree(FIXTURES / name, tmp_path / "run"))
    assert contents(FIXTURES / name) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error(checkpoint: Path, expected: torch.Tensor) -> float:
    return float((latents(checkpoint) - expected).norm() / expected.norm())


def test_the_checkpoint_generates_what_it_did(run: Path) -> None:
    expected = load_file(run / "latents.safetensors")["latents"]
    assert verify_checkpoint(run / "checkpoint").problems == []
    assert error(run / "checkpoint", expected) < TOLERANCE


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_of_the_checkpoint_counts(run: Path, section: str) -> None:
    path = run / "checkpoint" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][section] = None
    path.write_text(json.dumps(config))
    assert error(run / "checkpoint", load_file(run / "latents.safetensors")["latents"]) > 2 * TOLERANCE


def test_status_and_report_read_the_run(run: Path) -> None:
    stages = read_status(run).stages
    assert {name: (stage.done, stage.total) for name, stage in stages.items()} == {
        "trajectories": (4, 4), "selection": (1, 1), "activations": (2, 2), "distillation": (3, 3), "refinement": (1, 1),
        "assembly": (1, 1), "evaluation": (2, 4),
    }  # fmt: skip
    # Its evaluation had no teacher-forced pass and no weights of the steps yet.
    [quality] = [r.result["psnr_db"] for r in Manifest(run).records("evaluation") if "psnr_db" in r.result]
    assert f"{quality:.1f}" in write_report_of(run).read_text()


def test_records_and_arrays_are_whole(run: Path) -> None:
    directory = RunDirectory.open(run)
    for record in directory.manifest.records("activations"):
        assert all((run / output.path).is_file() for output in record.outputs)
        block = directory.calibration_store.read(f"activations/{record.unit}/transformer_blocks.0")
        assert block.dtype == torch.bfloat16
        assert bool(block.isfinite().all())
