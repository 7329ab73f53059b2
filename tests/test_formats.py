"""A checkpoint as earlier versions wrote it (tools/make_fixtures.py) is read for two minor releases at least; a run of format 1
is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.fetching import fetch_checkpoint
from pipeline.run_state import read_status
from reelquant.checkpoint.verify import verify_checkpoint
from storage.run_directory import RunDirectory, RunFormatUnknown
from tests.errors import raises
from tests.pipeline.small_run import write_report_of
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


def test_a_run_of_format_1_is_refused_with_what_to_do(run: Path) -> None:
    before = contents(run)
    config = json.loads((run / "config.json").read_text())["config"]
    attempts: dict[str, Callable[[], object]] = {
        "run": lambda: RunDirectory.open_or_create(run, config, {}, update=True),
        "plan": lambda: RunDirectory.check(run, config, update=True),
        "status": lambda: read_status(run),
        "report": lambda: write_report_of(run),
        "fetch": lambda: fetch_checkpoint(run, run.parent / "fetched"),
    }
    for attempt in attempts.values():
        with raises(RunFormatUnknown, run, "format 1", "another run directory", "checkpoint/", "verify"):
            attempt()
    assert contents(run) == before
