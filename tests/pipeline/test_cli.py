"""The command line: help of every command, mistakes without a traceback, and every shipped configuration planned."""

import logging
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.run_units import STAGES
from tests.errors import names
from tests.pipeline.small_run import ROOT, small_run
from tests.pipeline.small_run import command as command_line

CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("configs", "configs/papers")
    for path in (ROOT / folder).glob("*.yaml")
)
OTHERS = (
    "cogvideox-2b",
    "cogvideox-5b",
    "hunyuanvideo-1.5",
    "ltx-video",
    "mochi",
    "wan2.1-1.3b",
    "wan2.1-14b",
    "wan2.2-a14b",
    "wan2.2-ti2v-5b",
)
FROM_IMAGES = ("hunyuanvideo-i2v-13b", "wan2.1-i2v-14b", "wan2.2-i2v-a14b")
"""Whose prompts do not ship."""
NARROW = ("ltx-video", "wan2.1-1.3b")
"""Models of up to 2 B parameters, of which scales and rotations are a larger part."""
WITHOUT_WEIGHTS = dict.fromkeys(
    ("configs/hunyuanvideo-13b.yaml", "configs/papers/quantsparse.yaml", "configs/papers/s2q-vdit.yaml"),
    "configs/models/hunyuanvideo-13b",
) | {f"configs/{name}.yaml": f"configs/models/{name}" for name in (*OTHERS, *FROM_IMAGES)}
"""Configurations whose model does not ship, and the folder of its shapes."""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shipped configurations have paths relative to the checkout; the root logger is put back."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    handlers = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = handlers


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def fails(*arguments: str) -> str:
    """The output of a command that fails with a message and no traceback."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.output


COMMANDS = sorted(command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    [usage] = [line for line in result.output.splitlines() if line.startswith("Usage:")]
    assert re.fullmatch(rf"Usage: \S.* {name} \[OPTIONS\]( [A-Z]+| \[[A-Z]+\])+", usage)
    assert name in invoke("--help").output


def test_version_names_program_and_packages() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    changes = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False).returncode
    expected = head.strip() + ("-dirty" if changes else "")
    assert f"reelquant {version('reelquant')}, commit {expected}" in result.output.splitlines()
    assert f"torch {version('torch')}" in result.output


def test_an_unknown_stage_is_named_before_anything_else() -> None:
    message = fails("run", "nowhere.yaml", "--until", "activation")
    assert names(message, "--until", "activation", *STAGES)


PIPED, LARGE = "configs/demo.yaml", "configs/hunyuanvideo-13b.yaml"
"""Planned in a process of its own, and in test_plan.py."""


def test_configurations_ship() -> None:
    assert {"configs/demo.yaml", *WITHOUT_WEIGHTS} <= set(CONFIGS)


@pytest.mark.parametrize("config", [config for config in CONFIGS if config not in (PIPED, LARGE)])
def test_every_shipped_configuration_is_planned(config: str, tmp_path: Path) -> None:
    name = config.removeprefix("configs/").removesuffix(".yaml")
    arguments = ["plan", config, "--set", f"run={tmp_path / 'run'}"]
    if config in WITHOUT_WEIGHTS:
        arguments += ["--shapes-only", "--set", f"model={WITHOUT_WEIGHTS[config]}"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "problem:" not in result.output
    if name in FROM_IMAGES:
        assert names(result.output, "images/calibration.jsonl", "images/held_out.jsonl")
    assert not (tmp_path / "run").exists()
    if name in OTHERS:
        [smaller] = re.findall(r"reelquant +W4A8 .* (\d\.\d+)x", result.output)
        assert float(smaller) >= (3.74 if name in NARROW else 3.75)


def test_model_that_is_neither_here_nor_in_the_cache() -> None:
    output = fails("plan", "configs/hunyuanvideo-13b.yaml", "--set", "model=models/HunyuanVideo")
    assert names(output, "model", "models/HunyuanVideo", "HF_HUB_OFFLINE")


def test_wrong_values_of_every_command(tmp_path: Path) -> None:
    config = str(small_run(tmp_path))
    for command in ("plan", "run"):
        output = fails(command, config, "--set", "bits.weight=1", "--set", "sed=3")
        assert names(output, "bits.weight", 1, "sed")
        assert names(fails(command, str(tmp_path / "nowhere.yaml")), tmp_path / "nowhere.yaml")
        assert "brackets [like these]" in fails(command, config, "--set", "selection.strategy=brackets [like these]")
    for command in ("status", "report"):
        assert names(fails(command, str(tmp_path)), tmp_path, "config.json")
        assert names(fails(command, "gs://bucket/run"), "gs://bucket/run", "s3")
    assert names(fails("fetch", str(tmp_path), str(tmp_path)), tmp_path)
    assert names(fails("fetch", str(tmp_path), str(tmp_path / "copy")), tmp_path, "config.json")
    for location in ("s3://AKIA:wJalrXUtnFEMI@bucket/run", "s3://AKIA:wJalrXUtnFEMI@bucket"):
        output = fails("plan", config, "--set", f"run={location}")
        assert names(output, "run", "s3://***@bucket")
        assert "wJalrXUtnFEMI" not in output
    assert "problem: " in fails("verify", str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_infeasible_run_is_refused_before_it_begins(tmp_path: Path) -> None:
    config = str(small_run(tmp_path))
    for command in ("plan", "run"):
        output = fails(command, config, "--set", "generation.max_sequence_length=500", "--set", "workers.num_workers=0")
        assert names(output, "generation.max_sequence_length", 500, "workers.num_workers", 0)
    assert not (tmp_path / "run").exists()


def test_unknown_command_and_missing_argument() -> None:
    assert invoke("compress").exit_code == 2
    assert invoke("plan").exit_code == 2


def test_piped_output_is_plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own, as a user's shell starts it: no escape sequences, no warnings, nothing cut."""
    monkeypatch.delenv("COLUMNS")
    arguments = ("plan", PIPED, "--set", f"run={tmp_path / 'run'}")
    done = subprocess.run(command_line(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout
    assert "hunyuanvideo-digits" in done.stdout
    assert "problem:" not in done.stdout
    assert not (tmp_path / "run").exists()
