"""A whole run of the small model, cut to what a test needs, and ways to start one: here, or in a process of its own."""

import contextlib
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from pipeline.cli import app

ROOT = Path(__file__).resolve().parents[2]


def small_run(folder: Path, **changes: Any) -> Path:
    """Writes a configuration of a run in `folder` that takes under a minute, and returns its file."""
    (folder / "calibration.txt").write_text("the digit 3 moving left\nthe digit 5 moving up\n")
    (folder / "held_out.txt").write_text("the digit 7 moving right\n")
    config: dict[str, Any] = {
        "run": str(folder / "run"),
        "model": str(ROOT / "assets" / "hunyuanvideo-digits"),
        "generation": {
            "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "max_sequence_length": 32
        },
        "prompts": {
            "calibration": str(folder / "calibration.txt"), "num_calibration": 2,
            "held_out": str(folder / "held_out.txt"), "num_held_out": 1,
        },
        "selection": {"num_samples": 3, "recorded_features": ["block_input", "weight_error"]},
        "method": {"preset": "s2q", "rotation_block": 64, "epochs": 2},
        "distillation": {"segment_length": 3},
        "workers": {"num_workers": 1},  # each takes 5 s of a CPU to start
        **changes,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(*arguments: str) -> list[str]:
    """The command line of `python -m pipeline`."""
    return [sys.executable, "-m", "pipeline", *arguments]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end in this process, which has imported its packages already: a new one takes 7 s of a CPU for
    that. Where it is killed, or its whole output counts, start `command`."""
    handlers = list(logging.root.handlers)
    with contextlib.chdir(ROOT):
        result = CliRunner().invoke(app, list(arguments))
    logging.root.handlers[:] = handlers
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
