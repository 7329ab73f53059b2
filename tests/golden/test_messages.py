"""The messages that users meet, whole, in messages.txt, to be reviewed as text: the other tests assert keys and values only.

`python -m pytest tests/golden/test_messages.py --record-golden` writes what they say now.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import HunyuanVideoTransformer3DModel

import reelquant  # noqa: F401 - teaches diffusers to load the checkpoint
from pipeline.config.loading import load_config
from pipeline.hub_model import find_model, pinned
from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.checkpoint.verify import verify_checkpoint
from reelquant.checkpoint.writer import write_checkpoint
from reelquant.tokens import TokenLayout, band_width
from storage.location import parse_location
from storage.run_directory import RunDirectory
from tests.hub_server import hub_server, point_to, use_cache
from tests.pipeline import test_config, test_study
from tests.pipeline.small_run import ROOT, call, small_run
from tests.reelquant.checkpoint import test_schema
from tests.reelquant.runtime import test_sparse_attention
from tests.storage.test_place import NO_LOCATIONS
from tests.workers.test_component_check import CONFIG_MISTAKES, INDEX_MISTAKES, edit_tensors
from workers.model_source import check_model

MESSAGES = Path(__file__).with_name("messages.txt")
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
SCALE = "transformer_blocks.0.attn.to_k.weight_scale"
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


QUANTIZATION: dict[str, Callable[[dict[str, Any]], object]] = {
    "a newer format": lambda q: q.update(format_version=99),
    "no bits": lambda q: q.pop("bits"),
    "an impossible density": lambda q: q["sparse_attention"].update(density=0),
    "weights of 9 bits": lambda q: next(iter(q["layers"].values())).update(weight_bits=9),
    "a layer that the model lacks": lambda q: q["layers"].update(
        gone={**next(iter(q["layers"].values())), "group": "gone"}
    ),
    "head kinds of another model": lambda q: q["sparse_attention"]["head_kinds"].popitem(),
    "a residual above the head size": lambda q: q["sparse_attention"]["residual"].update(rank=65),
}
"""Edits of `quantization_config`."""
DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights are cut off": lambda c: cut(c / WEIGHTS),
    "a tensor is missing": lambda c: edit_tensors(c / WEIGHTS, lambda tensors: tensors.pop(SCALE)),
    "a scale is NaN": lambda c: edit_tensors(c / WEIGHTS, lambda tensors: tensors[SCALE].fill_(float("nan"))),
    "weights are missing": lambda c: (c / WEIGHTS).unlink(),
    "not quantized": lambda c: edit_json(
        c / "transformer" / "config.json", lambda config: config.pop("quantization_config")
    ),
    "no index": lambda c: (c / "model_index.json").unlink(),
    "a broken scheduler": lambda c: (c / "scheduler" / "scheduler_config.json").write_text("{"),
}
"""Damages of a checkpoint's folder."""
HUB_MISTAKES: list[dict[str, Any]] = [
    {"model": "maker/nothing"},
    {"model": "ma--ker/digits"},
    {"model": "maker/digits", "model_revision": "v7"},
    {"model": "maker/gated"},
    {"model": "maker/gguf"},
    {"model": "assets/hunyuanvideo-digits", "model_revision": "main"},
]
CONFIG = {"model": "small", "bits": {"weight": 4}}


def test_messages(
    tmp_path: Path, digits_model: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    found = {
        **of_configurations(tmp_path),
        **of_commands(tmp_path),
        **of_models(tmp_path, digits_model),
        **of_runs(tmp_path),
        **of_sections(),
        **of_checkpoints(tmp_path),
        **of_hub(tmp_path, digits_model, monkeypatch),
    }
    written = render(found, tmp_path)
    if pytestconfig.getoption("--record-golden"):
        MESSAGES.write_text(written, encoding="utf-8")
        return
    recorded = MESSAGES.read_text(encoding="utf-8")
    assert written == recorded, "\n".join(difflib.unified_diff(recorded.split("\n"), written.split("\n"), lineterm=""))


def render(messages: dict[str, str], folder: Path) -> str:
    """`## case`, the message, an empty line; without what differs from one call to the next."""
    text = "".join(f"## {name}\n{message.strip()}\n\n" for name, message in messages.items())
    text = text.replace(f"diffusers {diffusers.__version__}", "diffusers VERSION")
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


def of_models(folder: Path, sound: Path) -> dict[str, str]:
    """Says what is found in the folder of a model before a run."""
    model = Path(shutil.copytree(sound, folder / "model"))
    cases = [("model_index.json", changes) for changes, _ in INDEX_MISTAKES]
    cases += [("transformer/config.json", changes) for changes in CONFIG_MISTAKES]
    cases += [("transformer/config.json", {"_class_name": "AllegroTransformer3DModel"})]
    cases += [("transformer/config.json", {"quantization_config": {"quant_method": "reelquant"}})]
    found = {}
    for file, changes in cases:
        (model / file).write_text(json.dumps({**json.loads((sound / file).read_text()), **changes}))
        found[f"model: {file} with {json.dumps(changes)}"] = "\n".join(check_model(model, weights=False).problems)
        shutil.copy(sound / file, model / file)
    edit_tensors(model / WEIGHTS, lambda tensors: tensors.pop("proj_out.bias"))
    edit_tensors(model / WEIGHTS, lambda tensors: tensors["x_embedder.proj.bias"].fill_(float("inf")))
    cut(model / "vae" / "diffusion_pytorch_model.safetensors")
    shutil.rmtree(model / "tokenizer_2")
    (model / "scheduler" / "scheduler_config.json").unlink()
    (model / "text_encoder" / "adapter_config.json").write_text("{}")
    return found | {"model: damaged in many places": "\n".join(check_model(model).problems)}


def of_runs(folder: Path) -> dict[str, str]:
    """Says what a run's folder cannot be."""
    RunDirectory.open_or_create(folder / "run", CONFIG, {})
    (folder / "home").mkdir()
    (folder / "home" / "thesis.txt").write_text("years of work")
    RunDirectory.open_or_create(folder / "broken", CONFIG, {})
    (folder / "broken" / "config.json").write_text("[]")
    other = {"model": "tiny", "bits": {"weight": 6}, "seed": 1}
    found: dict[str, str] = {}
    for name, config in (("run", other), ("home", CONFIG), ("home/thesis.txt", CONFIG), ("broken", CONFIG)):
        with refused(f"run's folder: {name}", found):
            RunDirectory.open_or_create(folder / name, config, {})
    for location in NO_LOCATIONS:
        with refused(f"run: {location}", found):
            parse_location(location)
    return found


def of_sections() -> dict[str, str]:
    """Says what the sections of `quantization_config` cannot be."""
    found: dict[str, str] = {}
    for changes, _ in test_schema.MISTAKES:
        with refused(f"quantization_config: {json.dumps(changes)}", found):
            QuantizationSpec.from_dict(test_schema.spec_dict(**changes))
    for section, _ in test_sparse_attention.MISTAKES:
        with refused(f"sparse_attention: {json.dumps(section)}", found):
            SparseAttentionSpec.from_dict(section)
    with refused("sparse_attention: a density below one token", found):
        band_width(TokenLayout(2, 3, 4, 2), 0.01)
    return found


def of_checkpoints(folder: Path) -> dict[str, str]:
    """Says what `from_pretrained` and `verify` find in a checkpoint that is damaged or of another version."""
    found: dict[str, str] = {}
    for name, edit in QUANTIZATION.items():
        with own_checkpoint(folder) as checkpoint, refused(f"checkpoint: {name}", found):
            edit_json(checkpoint / "transformer" / "config.json", lambda config: edit(config["quantization_config"]))  # noqa: B023
            HunyuanVideoTransformer3DModel.from_pretrained(checkpoint / "transformer")
    for name, damage in DAMAGES.items():
        with own_checkpoint(folder) as checkpoint:
            damage(checkpoint)
            found[f"verify: {name}"] = "\n".join(verify_checkpoint(checkpoint).problems)
    with own_checkpoint(folder) as checkpoint, refused(f"checkpoint: without {SCALE}", found):
        DAMAGES["a tensor is missing"](checkpoint)
        HunyuanVideoTransformer3DModel.from_pretrained(checkpoint / "transformer")
    with refused("checkpoint: a block on the disk", found):
        transformer = FIXTURE / "checkpoint" / "transformer"
        HunyuanVideoTransformer3DModel.from_pretrained(
            transformer, device_map={"": "cpu", "transformer_blocks.0": "disk"}
        )
    with refused("checkpoint: saved without safetensors", found):
        HunyuanVideoTransformer3DModel.from_pretrained(transformer).save_pretrained(folder, safe_serialization=False)
    with refused("checkpoint: of a checkpoint", found):
        write_checkpoint(FIXTURE / "checkpoint", folder / "again", artifacts=[], bits="W4A6", method="rtn")
    return found


def of_hub(folder: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Says why a model of the Hub cannot be taken."""
    found: dict[str, str] = {}
    (folder / "gguf").mkdir()
    (folder / "gguf" / "model.gguf").write_bytes(b"x")
    use_cache(folder / "hub", monkeypatch)
    with hub_server() as hub:
        point_to(hub.endpoint, monkeypatch)
        sound_one = hub.repository("maker/digits")
        sound_one.tags["v1"] = commit = sound_one.commit(sound)
        hub.repository("maker/gated").gated = True
        for name, files in (("gated", sound), ("gguf", folder / "gguf")):
            hub.repository(f"maker/{name}").commit(files)
        for changes in HUB_MISTAKES:
            with refused(f"hub: {json.dumps(changes)}", found):
                find_model(pinned(load_config(small_run(folder, **changes)))[0])
        (folder / "full").write_text("x")
        use_cache(folder / "full", monkeypatch)
        with refused("hub: a cache that cannot be written", found):
            find_model(load_config(small_run(folder, model="maker/digits", model_commit=commit)))
    point_to(hub.endpoint, monkeypatch)  # no open connection stays
    with refused("hub: it does not answer", found):
        pinned(load_config(small_run(folder, model="maker/other")))
    text = json.dumps(found)
    for commits in (repository.commits for repository in hub.repositories.values()):
        for name in commits:
            text = text.replace(name, "COMMIT")
    result: dict[str, str] = json.loads(text.replace(hub.endpoint, "http://HUB"))
    return result


@contextmanager
def refused(name: str, found: dict[str, str]) -> Iterator[None]:
    """Notes what the ValueError inside says."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is what is asked for
        yield
    found[name] = str(raised.value)


@contextmanager
def own_checkpoint(folder: Path) -> Iterator[Path]:
    """A copy of the fixture's, that is damaged and goes."""
    checkpoint = Path(shutil.copytree(FIXTURE / "checkpoint", folder / "checkpoint"))
    yield checkpoint
    shutil.rmtree(checkpoint)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])
