"""`init` writes a configuration that `plan` accepts, and never over another file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.config.loading import ConfigError, load_config
from pipeline.config.schema import BitsConfig, RunConfig
from pipeline.default_generation import default_generation, size_steps
from pipeline.new_config import COMMENTS, IMAGE_LINE, write_config
from pipeline.plan import plan_config
from reelquant.settings.generation import Generation
from tests.errors import names, raises
from tests.hub_server import HubServer
from tests.pipeline.small_run import ROOT, call
from tests.pipeline.test_default_generation import TINY
from tests.pipeline.test_prompts import image, write_lines
from tests.reelquant.families import tiny_pipelines
from workers.component_check import pipeline_inputs

SMALL = ("generation.height=48", "generation.width=64", "generation.num_frames=9", "generation.num_inference_steps=3")
THIRTEEN_B = ROOT / "configs" / "models" / "hunyuanvideo-13b"


def init(file: Path, model: str | Path, *overrides: str, options: tuple[str, ...] = ()) -> str:
    values = (part for override in overrides for part in ("--set", override))
    done = call("init", str(file), "--model", str(model), *options, *values)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_what_is_written_is_planned(tmp_path: Path, digits_model: Path) -> None:
    file = tmp_path / "my run.yaml"
    said = init(file, digits_model, *SMALL, f"run={tmp_path / 'run'}", "method=gptq", "compare=[rtn, {preset: quarot}]")
    assert f"python -m pipeline plan '{file}'" in said
    config = load_config(file)
    assert (config.model, config.run) == (digits_model, tmp_path / "run")
    assert [method.preset for method in config.methods] == ["gptq", "rtn", "quarot"]
    done = call("plan", str(file))
    assert done.returncode == 0, done.stdout
    assert "problem:" not in done.stdout
    text = file.read_text()
    comments = {**COMMENTS, "generation": COMMENTS["generation"].format(steps=size_steps(digits_model))}
    assert all(f"# {line}" in text for comment in comments.values() for line in comment.splitlines())
    assert set(COMMENTS) <= set(yaml.safe_load(text)) <= set(RunConfig.model_fields)


def test_size_and_steps_are_those_of_the_family_and_the_preset_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the prompts that ship are found from anywhere
    write_config(Path("run.yaml"), str(THIRTEEN_B))
    config = load_config(Path("run.yaml"))
    assert config.generation == Generation()
    assert config.bits == BitsConfig()
    assert config.method.preset == RunConfig.model_fields["method"].default.preset
    assert config.prompts.calibration.is_file()
    assert config.run == Path("runs/run")


def test_an_id_of_the_hub_stays_one(tmp_path: Path, digits_model: Path, hub: HubServer) -> None:
    repository = hub.repository("maker/digits")
    repository.tags["v1"] = repository.commit(digits_model)
    init(tmp_path / "run.yaml", "maker/digits", *SMALL, options=("--revision", "v1"))
    config = load_config(tmp_path / "run.yaml")
    assert (str(config.model), config.model_revision, config.model_commit) == ("maker/digits", "v1", None)
    for key, about_model in (("model_revision", {"revision": "v7"}), ("model_variant", {"variant": "bf16"})):
        with raises(ValueError, key, *about_model.values()):
            write_config(tmp_path / "other.yaml", "maker/digits", SMALL, **about_model)
    assert not [name for name in hub.downloads("maker/digits") if name.endswith(".safetensors")]


def test_nothing_is_written_over_or_without_a_model(tmp_path: Path, digits_model: Path) -> None:
    file = tmp_path / "run.yaml"
    for model, override, words in (
        (tmp_path / "nowhere", "seed=1", ("model", tmp_path / "nowhere")),
        ("", "seed=1", ("model", "empty")),
        (digits_model, "bits.weight=1", ("bits.weight", 1)),
        (digits_model, "sed=1", ("sed",)),
        (digits_model, "generation.height=50", ("generation.height", 50)),
    ):
        with raises(ValueError, *words):
            write_config(file, str(model), [override])
        assert not file.exists()
    for there in (file, tmp_path / "link.yaml"):
        there.write_text("mine") if there == file else there.symlink_to("nowhere")
        done = call("init", str(there), "--model", str(digits_model))
        assert done.returncode == 1
        assert names(done.stdout, there)
    assert file.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_variant_that_no_component_has_and_a_missing_folder_are_named_at_once(
    tmp_path: Path, digits_model: Path
) -> None:
    with raises(ValueError, "model_variant", "fp16"):
        write_config(tmp_path / "run.yaml", str(digits_model), SMALL, variant="fp16")
    file = tmp_path / "no" / "such" / "run.yaml"
    with raises(ValueError, file, file.parent):
        write_config(file, str(digits_model), SMALL)
    assert list(tmp_path.iterdir()) == []


SIZES = {"ltx_video": ("generation.height=128", "generation.width=192")}
"""Of pipelines whose tiny VAE compresses less than the real one: at the default their schedule has no shift for the tokens."""


@pytest.mark.parametrize("name", TINY)
def test_a_run_of_every_pipeline_is_ready_for_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = getattr(tiny_pipelines, name)(tmp_path / "model")
    written = write_config(Path("run.yaml"), str(model), SIZES.get(name, ()))
    config = load_config(Path("run.yaml"))
    assert (set(written.absent) == set()) == (pipeline_inputs(model).image != "needed")
    for path, num in written.absent.items():
        file = image(Path(path).with_suffix(".png"), written.image_size)
        write_lines(Path(path), *({"prompt": f"{path} {line}", "image": file.name} for line in range(num)))
    assert plan_config(config).problems == []
    given = {"height": 128, "width": 192} if name in SIZES else {}
    assert config.generation.to_dict() == {**default_generation(model), **given}


# Models from images


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.wan_ti2v(tmp_path_factory.mktemp("i2v") / "model")


def test_files_with_images_are_to_be_written(
    tmp_path: Path, image_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = init(tmp_path / "run.yaml", image_model, *SMALL, "prompts.num_held_out=5")
    assert names(
        said, "images/calibration.jsonl: 10", "images/held_out.jsonl: 5", IMAGE_LINE, "64 x 48", "--shapes-only"
    )
    assert set(json.loads(IMAGE_LINE)) == {"prompt", "image"}
    text = (tmp_path / "run.yaml").read_text()
    assert names(text, f"#   {IMAGE_LINE}", "64 x 48")
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("run.yaml"))
    assert plan_config(config, shapes_only=True).problems == []
    with raises(ConfigError, "images/calibration.jsonl", "images/held_out.jsonl"):
        plan_config(config)


def test_a_file_of_prompts_that_is_given_is_checked(
    tmp_path: Path, image_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, texts = Path("run.yaml"), Path("texts.txt")
    texts.write_text("".join(f"a gull {number}\n" for number in range(16)))
    for given, words in ((texts, ("texts.txt", "image")), ("gone.jsonl", ("gone.jsonl",))):
        with raises(ConfigError, "prompts.held_out", *words):
            write_config(file, str(image_model), [*SMALL, f"prompts.held_out={given}"])
    image(tmp_path / "red.png", (64, 48))
    write_lines(Path("mine.jsonl"), *({"prompt": f"a gull {number}", "image": "red.png"} for number in range(10)))
    assert list(write_config(file, str(image_model), [*SMALL, "prompts.calibration=mine.jsonl"]).absent) == [
        "images/held_out.jsonl"
    ]
    assert load_config(file).prompts.calibration == Path("mine.jsonl")
    # What is there already where it would be written is checked, too.
    Path("images").mkdir()
    write_lines(Path("images/held_out.jsonl"), {"prompt": "a gull"})
    with raises(ConfigError, "prompts.held_out", "images/held_out.jsonl", 16):
        write_config(Path("other.yaml"), str(image_model), [*SMALL, "prompts.calibration=mine.jsonl"])


def test_an_image_that_is_not_there_is_named(tmp_path: Path, image_model: Path) -> None:
    lines = ({"prompt": f"a gull {number}", "image": "gone.png"} for number in range(16))
    given = write_lines(tmp_path / "held_out.jsonl", *lines)
    with raises(ConfigError, "prompts.held_out", "gone.png"):
        write_config(tmp_path / "run.yaml", str(image_model), [*SMALL, f"prompts.held_out={given}"])
