"""The messages that users meet, whole, in messages.txt, to be reviewed as text: the other tests assert keys and values only.

`python -m pytest tests/golden/test_messages.py --record-golden` writes what they say now.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file

import reelquant  # noqa: F401 - teaches diffusers to load the checkpoint
from tests.pipeline import test_config, test_study
from tests.pipeline.small_run import ROOT, call, small_run

MESSAGES = Path(__file__).with_name("messages.txt")
FIXTURE = ROOT / "tests" / "fixtures" / "run-1-checkpoint-2"
COMMANDS: list[tuple[str, ...]] = [
    ("run", "nowhere.yaml"),
    ("run", "nowhere.yaml", "--until", "activation"),
    ("plan", "CONFIG", "--set", "generation.max_sequence_length=500", "--set", "workers.num_workers=0"),
    ("plan", "CONFIG", "--set", "model=nowhere"),
    ("plan", "CONFIG", "--set", "prompts.calibration=nowhere.txt"),
    ("plan", "CONFIG", "--set", "prompts.num_calibration=3"),
    ("plan", "CONFIG", "--set", "method={preset: s2q_quantsparse, attention: {dense_layers: 9}}"),
    ("plan", "CONFIG", "--set", "bits.exceptions=[{pattern: 'nothing.*', weight: 3}]"),
    ("status", "FOLDER"),
    ("status", "gs://bucket/run"),
    ("report", "FOLDER"),
    ("fetch", "FOLDER", "FOLDER"),
    ("verify", "FOLDER"),
    ("submit", "CONFIG", "--address", "127.0.0.1:8265"),
]


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a newer format": lambda c: c["quantization_config"].update(format_version=99),
    "no bits": lambda c: c["quantization_config"].pop("bits"),
    "an impossible density": lambda c: c["quantization_config"]["sparse_attention"].update(density=0),
    "weights of 9 bits": lambda c: next(iter(c["quantization_config"]["layers"].values())).update(weight_bits=9),
}


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    written = render({**of_configurations(tmp_path), **of_commands(tmp_path), **of_checkpoints(tmp_path)}, tmp_path)
    if pytestconfig.getoption("--record-golden"):
        MESSAGES.write_text(written, encoding="utf-8")
        return
    recorded = MESSAGES.read_text(encoding="utf-8")
    assert written == recorded, "\n".join(difflib.unified_diff(recorded.split("\n"), written.split("\n"), lineterm=""))


def render(messages: dict[str, str], folder: Path) -> str:
    """`## case`, the message, an empty line; without what differs from one call to the next."""
    text = "".join(f"## {name}\n{message.strip()}\n\n" for name, message in messages.items())
    return text.replace(str(folder), "FOLDER").replace(str(ROOT), "CHECKOUT")


def of_configurations(folder: Path) -> dict[str, str]:
    found = {}
    for changes, _ in test_config.MISTAKES:
        problems = test_config.problems_of(test_config.write(folder, **changes))
        found[f"run: {json.dumps(changes)}"] = "\n".join(problems)
    for override in test_config.WRONG_OVERRIDES:
        found[f"--set {override}"] = "\n".join(test_config.problems_of(test_config.write(folder), override))
    for changes, _ in test_study.MISTAKES:
        found[f"study: {json.dumps(changes)}"] = "\n".join(test_study.problems_of(test_study.write(folder, **changes)))
    return found


def of_commands(folder: Path) -> dict[str, str]:
    config = str(small_run(folder))
    found = {}
    for words in COMMANDS:
        done = call(*(word.replace("CONFIG", config).replace("FOLDER", str(folder)) for word in words))
        assert done.returncode == 1, words
        said = [line for line in done.stdout.splitlines() if re.match(r"error:|problem:|  ", line)] or [done.stdout]
        found[" ".join(words)] = "\n".join(said)
    return found


def of_checkpoints(folder: Path) -> dict[str, str]:
    """What `from_pretrained` says of a checkpoint that is damaged or of another version."""
    found = {}
    for name, edit in EDITS.items():
        checkpoint = Path(shutil.copytree(FIXTURE / "checkpoint" / "transformer", folder / "checkpoint"))
        config = json.loads((checkpoint / "config.json").read_text())
        edit(config)
        (checkpoint / "config.json").write_text(json.dumps(config))
        found[f"checkpoint: {name}"] = refusal(checkpoint)
        shutil.rmtree(checkpoint)
    checkpoint = Path(shutil.copytree(FIXTURE / "checkpoint" / "transformer", folder / "checkpoint"))
    weights = checkpoint / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    lost = "transformer_blocks.0.attn.to_k.weight_scale"
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, weights)
    found[f"checkpoint: without {lost}"] = refusal(checkpoint)
    return found


def refusal(checkpoint: Path) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is what is asked for
        HunyuanVideoTransformer3DModel.from_pretrained(checkpoint)
    return str(raised.value)
