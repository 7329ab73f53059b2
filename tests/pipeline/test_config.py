"""Loading a configuration: every mistake is named with its value and the ways out, all of them at once, without torch."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipeline.config.loading import ConfigError, load_config, parse_config
from pipeline.config.method import parse_method
from pipeline.config.prompts import read_prompts, repeated_prompts
from pipeline.config.reference import keys
from pipeline.config.schema import RunConfig
from pipeline.context import RunContext, build_context, prompt_notes
from pipeline.study.expansion import load_study
from reelquant.settings.recipe import PRESETS, Recipe
from storage.location import parse_location
from tests.errors import names, raises

LEAST: dict[str, Any] = {"run": "r", "model": "m", "prompts": {"calibration": "c.txt", "held_out": "h.txt"}}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **changes}))
    return path


def texts(path: Path, num: int, key: str) -> list[str]:
    return [prompt.prompt for prompt in read_prompts(path, num, key)]


def problems_of(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    assert str(raised.value) == "\n".join(raised.value.problems)
    return raised.value.problems


def test_least_configuration_has_what_won(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert (config.method.preset, config.selection.strategy, config.selection.features) == (
        "reelquant", "uniform", ("latent",)
    )  # fmt: skip
    assert (config.prompts.num_calibration, config.selection.num_samples, config.method.epochs) == (10, 40, 5)
    assert (config.bits.weight, config.bits.activation) == (4, 8)
    assert config.methods == (config.method,)


@pytest.mark.parametrize("weight", range(2, 9))
def test_other_layers_follow_the_blocks_weight_bits(tmp_path: Path, weight: int) -> None:
    bits = load_config(write(tmp_path, bits={"weight": weight, "refiner": {"activation": 8}})).bits
    kinds = (bits.modulation, bits.refiner, bits.embedder)
    assert [kind.weight for kind in kinds] == [max(4, weight), max(6, weight), 8]
    assert [kind.activation for kind in kinds] == [16, 8, 16]
    assert load_config(write(tmp_path, bits={"weight": 4}), [f"bits.weight={weight}"]).bits.modulation.weight == max(
        4, weight
    )
    given = {"modulation": {"weight": 2}, "refiner": {"weight": 16}, "embedder": {"weight": 3}}
    bits = load_config(write(tmp_path, bits={"weight": weight, **given})).bits
    assert [bits.modulation.weight, bits.refiner.weight, bits.embedder.weight] == [2, 16, 3]


def test_features_are_recorded_as_far_as_they_are_read(tmp_path: Path) -> None:
    def recorded(**selection: Any) -> tuple[str, ...]:
        return load_config(write(tmp_path, selection=selection)).selection.features

    assert recorded(quantization_feature="weight_error") == ("latent",), "uniform reads none"
    assert recorded(strategy="salience") == ("latent",)
    assert recorded(strategy="stratified", quantization_feature="weight_error") == ("latent", "weight_error")
    assert recorded(recorded_features=["block_input", "latent"]) == ("latent", "block_input")


def test_configuration_survives_its_json(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, compare=["rtn", {"preset": "gptq", "solve": "asymmetric"}]))
    again = RunConfig.model_validate({**config.identity(), "run": "r"})
    assert again == config
    about_the_model = {"model_revision", "model_commit", "model_variant"}
    assert set(config.model_dump()) - set(config.identity()) == {"run", "cache", "workers", "cluster", *about_the_model}


def float_fields() -> list[list[str]]:
    """Places of all numbers with a fraction in a configuration, those of its sections too."""
    return [key.name.split(".") for key in keys() if "number" in key.type.replace("whole number", "")]


def test_every_number_must_be_finite(tmp_path: Path) -> None:
    fields = float_fields()
    for known in ("generation.guidance_scale", "method.lambda_global", "method.attention.density"):
        assert known.split(".") in fields
    for place in fields:
        for value in (float("nan"), float("inf"), -float("inf")):
            changes: Any = value
            for key in reversed(place):
                changes = {key: changes}
            with pytest.raises(ConfigError):
                load_config(write(tmp_path, **changes))


MISTAKES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"generaton": {}}, ("generaton:",)),
    ({"selection": {"num_sample": 3}}, ("selection.num_sample:",)),
    ({"compare": ["rtn", {"preset": "s2q", "epoch": 3}]}, ("compare.1.epoch:",)),
    ({"bits": {"weight": 1}}, ("bits.weight:", "it is 1")),
    ({"bits": {"weight": 9}}, ("bits.weight:", "it is 9")),
    ({"bits": {"weight": 16}}, ("bits.weight:", "it is 16")),
    ({"bits": {"activation": 3}}, ("bits:", "3", "4 to 8", "16")),
    ({"bits": {"modulation": {"activation": 12}}}, ("bits.modulation:", "12", "4 to 8", "16")),
    ({"generation": {"height": 8}}, ("generation.height", "8", "16")),
    ({"generation": {"num_frames": 0}}, ("generation.num_frames", "0", "1")),
    ({"distillation": {"segment_length": 0}}, ("distillation.segment_length", "0", "all")),
    ({"selection": {"strategy": "best"}}, ("selection.strategy", "'best'")),
    ({"method": "s3q"}, ("method", "'s3q'", "rtn, smoothquant, quarot, gptq, s2q")),
    ({"method": {"preset": "s2q", "epochs": 0}}, ("channel_scale, rotation, clip", "epochs is 0")),
    ({"method": {"preset": "rtn", "solve": "asymmetric"}}, ("solve asymmetric", "rounding")),
    ({"method": {"preset": "rtn", "name": "../x"}}, ("method name '../x'",)),
    ({"compare": ["reelquant"]}, ("method and compare", "['reelquant', 'reelquant']", "`name`")),
    ({"prompts": None}, ("prompts:",)),
    ({"seed": -1}, ("seed:", "it is -1")),
    ({"seed": 2**70}, ("seed:", f"it is {2**70}")),
    ({"model_variant": "../fp16"}, ("model_variant:",)),
    ({"workers": {"gpus_per_replica": 2}}, ("workers.gpus_per_replica is 2", "workers.sharding")),
    ({"workers": {"offload": "cpu"}}, ("workers.offload cpu", "workers.sharding", "fsdp or deepspeed")),
    ({"workers": {"sharding": "fsdp", "num_gpus": 0.5}}, ("workers.num_gpus is 0.5", "workers.sharding fsdp")),
    ({"workers": {"sharding": "fsdp", "num_gpus": 2}}, ("workers.num_gpus is 2", "workers.sharding fsdp")),
    ({"workers": {"sharding": "fsdp", "offload": "nvme"}}, ("workers.offload is nvme", "workers.sharding: deepspeed")),
    ({"workers": {"sharding": "deepspeed", "offload": "nvme"}}, ("workers.offload is nvme", "workers.offload_path")),
    ({"workers": {"sharding": "deepspeed", "offload_path": "x"}}, ("workers.offload_path is x", "workers.offload")),
]
"""Changes to `LEAST`, and the key and the value that the message names; whole messages stand in tests/golden/messages.txt."""


@pytest.mark.parametrize(("changes", "expected"), MISTAKES)
def test_mistake_is_named_with_its_value(tmp_path: Path, changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    [problem] = problems_of(write(tmp_path, **changes))
    assert problem.startswith(f"{tmp_path / 'run.yaml'}: ")
    assert [part for part in expected if part not in problem] == []


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, bits={"weight": 1, "refiner": {"weight": 99}}, seed="many", unknown=1)
    problems = problems_of(path, "workers.max_attempts=0")
    assert [problem.split(": ")[1] for problem in problems] == [
        "seed", "bits.weight", "bits.refiner.weight", "workers.max_attempts", "unknown",
    ]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_what_is_left_out(preset: str) -> None:
    method = parse_method(preset)
    assert method.name == preset
    assert method == PRESETS[preset]
    changed = parse_method({"preset": preset, "damping": 0.5, "name": "mine"})
    assert (changed.damping, changed.name, changed.rotation) == (0.5, "mine", method.rotation)


def test_protected_steps_are_a_number_or_a_share_of_all() -> None:
    def protected(value: float) -> list[int]:
        method = parse_method({"preset": "rtn", "protected_steps": value})
        return [method.num_protected_steps(steps) for steps in (2, 16, 50)]

    assert protected(0) == [0, 0, 0]
    assert protected(4) == [4, 4, 4]
    assert protected(0.25) == [1, 4, 12]
    assert protected(0.05) == [1, 1, 2]


def test_overrides(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, method="gptq"),
        [
            "generation.height=320",
            "selection={num_samples: 7}",
            "distillation.segment_length=all",
            "method.weight_layout=two_level",
            "compare=[rtn]",
            "evaluation.recognizer=null",
            "workers.num_gpus=0.5",
        ],
    )
    assert config.generation.height == 320
    assert config.selection.num_samples == 7
    assert config.distillation.segment_length == "all"
    # A preset's name gives way to a mapping, and stays the preset.
    assert (config.method.preset, config.method.rounding, config.method.weight_layout) == ("gptq", "gptq", "two_level")
    assert [method.name for method in config.methods] == ["gptq", "rtn"]
    assert config.workers.num_gpus == 0.5


def test_later_override_wins(tmp_path: Path) -> None:
    assert load_config(write(tmp_path), ["seed=1", "seed=2"]).seed == 2


def test_preset_of_another_name_by_override(tmp_path: Path) -> None:
    method = load_config(write(tmp_path, method={"preset": "s2q", "epochs": 3}), ["method=rtn"]).method
    assert (method.name, method.epochs) == ("rtn", 0)


WRONG_OVERRIDES = {
    "seed": ("--set 'seed'", "key.path=value"),
    "=3": ("--set '=3'", "key.path=value"),
    "seed=[1": ("--set 'seed=[1'", "YAML"),
    "run.folder=x": ("--set 'run.folder=x'", "run is 'r'"),
    "selection.number=3": ("selection.number:",),
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_wrong_override(tmp_path: Path, override: str) -> None:
    [problem] = problems_of(write(tmp_path), override)
    assert [part for part in WRONG_OVERRIDES[override] if part not in problem] == []


def test_sharding_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    plain = load_config(write(tmp_path))
    sharded = load_config(write(tmp_path, workers={"sharding": "deepspeed", "gpus_per_replica": 2, "offload": "cpu"}))
    assert (plain.workers.num_ranks, sharded.workers.num_ranks) == (None, 2)
    assert plain.identity() == sharded.identity()


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n- 2\n", b"", b"\xff\xfe\x00", b"just words"])
def test_unreadable_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    [problem] = problems_of(path)
    assert str(path) in problem
    assert "YAML" in problem or "not a mapping" in problem


def test_missing_file(tmp_path: Path) -> None:
    [problem] = problems_of(tmp_path / "nowhere.yaml")
    assert names(problem, tmp_path / "nowhere.yaml")


def test_where_stands_in_front() -> None:
    with raises(ConfigError, "here: run"):
        parse_config({key: value for key, value in LEAST.items() if key != "run"}, "here")


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n  first \n\nzweitens: Blüten\r\nthird\n", encoding="utf-8")
    assert texts(path, 2, "held_out") == ["first", "zweitens: Blüten"]
    with raises(ConfigError, "prompts.num_held_out", 4, 3, path):
        read_prompts(path, 4, "held_out")
    with raises(ConfigError, "prompts.calibration", tmp_path / "gone.txt"):
        read_prompts(tmp_path / "gone.txt", 1, "calibration")
    path.write_bytes(b"caf\xe9\n")
    with raises(ConfigError, "prompts.calibration", path, "UTF-8"):
        read_prompts(path, 1, "calibration")
    path.write_text(" \n\n")
    with raises(ConfigError, "prompts.calibration", path, "no"):
        read_prompts(path, 1, "calibration")


def test_configuration_needs_no_torch() -> None:
    code = (
        "import sys; import pipeline.config.loading, pipeline.config.schema, pipeline.config.method; "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'ray', 'numpy') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sparse_attention_brings_both_papers_unless_a_preset_is_named() -> None:
    assert parse_method({}).preset == "reelquant"
    assert parse_method({"attention": {"density": 1.0}}).preset == "reelquant"
    sparse = parse_method({"attention": {"density": 0.15}})
    assert (sparse.preset, sparse.name, sparse.attention.density) == ("s2q_quantsparse", "s2q_quantsparse", 0.15)
    assert parse_method({"preset": "gptq", "attention": {"density": 0.15}}).attention_distillation == "none"
    # A section that says one thing keeps the preset's others, also one level down.
    ranked = parse_method({"preset": "s2q_quantsparse", "attention": {"residual": {"rank": 8}}})
    assert (ranked.attention.residual.rank, ranked.attention.residual.extrapolation) == (8, "linear")
    assert (ranked.attention.dense_steps, ranked.attention.calibrate) == (5, "dense")
    assert parse_method({"preset": "quantsparse", "attention": {"interval": 3}}).attention.density == 0.25


def test_a_part_of_the_tokens_reaches_the_recipe() -> None:
    assert parse_method("s2q").tokens_per_step == 1.0
    for changes in (
        {"preset": "s2q"},
        {"preset": "s2q_quantsparse"},
        {"preset": "s2q", "attention_distillation": "both"},
    ):
        assert parse_method({**changes, "tokens_per_step": 0.5}).tokens_per_step == 0.5


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"attention": {"density": 0.0}}, ("attention.density", "0.0")),
        ({"attention": {"density": 1.2}}, ("attention.density", 1.2)),
        ({"attention": {"density": 0.2, "interval": 0}}, ("attention.interval", 0)),
        ({"attention": {"density": 0.2, "residual": {"order": 3}}}, ("residual.order", 3)),
        ({"attention": {"density": 0.2, "residual": {"rank": None}}}, ("residual.rank", "low_rank_int8")),
        ({"attention": 0.2}, ("attention", 0.2)),
        ({"preset": "gptq", "attention_distillation": "both"}, ("gptq", "attention_distillation", "both")),
        ({"tokens_per_step": 0}, ("tokens_per_step", 0)),
        ({"tokens_per_step": 1.5}, ("tokens_per_step", 1.5)),
        ({"preset": "gptq", "tokens_per_step": 0.5}, ("gptq", "tokens_per_step", 0.5, "learned")),
        (
            {"preset": "quantsparse", "tokens_per_step": 0.25, "attention": {"calibrate": "sparse"}},
            ("tokens_per_step", 0.25, "sparse", "attention.calibrate", "attention.density"),
        ),
        (
            {"tokens_per_step": 0.25, "attention": {"density": 0.2, "calibrate": "corrected"}},
            ("tokens_per_step", 0.25, "corrected", "attention.calibrate", "attention.density"),
        ),
        ({"lambda_local": -1}, ("lambda_local", -1, "auto")),
        ({"protected_activation_bits": 3}, ("protected_activation_bits", 3)),
        ({"protected_steps": 2.5}, ("protected_steps", 2.5)),
    ],
)
def test_impossible_sparse_settings_are_refused(method: dict[str, Any], words: tuple[object, ...]) -> None:
    with raises(ValidationError, *words):
        parse_method(method)


SEPARATORS = ["first line\u2028same prompt", "next\u2029still\x85and\x0cmore\x0b\x1c."]


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfa red bird\r\na blue fish\r\n", ["a red bird", "a blue fish"]),
        (b"\xef\xbb\xbf\n\n  one\rtwo\n", ["one", "two"]),
        (b"one\n\xef\xbb\xbftwo\n", ["one", "two"]),
        ("\n".join(SEPARATORS).encode(), SEPARATORS),
        ("caf\u00e9 \U0001f408\tin  a bar".encode(), ["caf\u00e9 \U0001f408\tin  a bar"]),
    ],
)
def test_marks_and_line_ends_of_prompt_files(tmp_path: Path, content: bytes, prompts: list[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert texts(path, len(prompts), "calibration") == prompts
    with pytest.raises(ConfigError):
        read_prompts(path, len(prompts) + 1, "calibration")


def test_prompts_that_are_the_same_are_noted_and_never_held_out(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"The digit 3\nthe digit 4\n  the  DIGIT 3\nnever used: the digit 4\n")
    (tmp_path / "h.txt").write_bytes(b"\xef\xbb\xbfThe  digit 4\n")
    files = {"calibration": str(tmp_path / "c.txt"), "held_out": str(tmp_path / "h.txt")}
    model = Path(__file__).resolve().parents[2] / "assets" / "hunyuanvideo-digits"
    values = {"prompts": {**files, "num_calibration": 3, "num_held_out": 1}, "selection": {"num_samples": 2}}
    config = parse_config({**LEAST, **values, "model": str(model)}, "test")
    with pytest.raises(ConfigError) as caught:
        build_context(config, weights=False)
    assert any(p.startswith("prompts.held_out") and "The  digit 4" in p for p in caught.value.problems)
    (tmp_path / "h.txt").write_text("the digit 9\n")
    [note] = prompt_notes(build_context(config, weights=False))
    assert note.startswith("prompts.calibration")
    assert "'The digit 3'" in note
    fish = [("\ufb01sh", None, 1), ("Fish ", None, 4), ("f i s h", None, 5), ("FISH", b"image", 6)]
    assert repeated_prompts(fish) == [("\ufb01sh", [1, 4])]


def test_the_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    prompts = {"calibration": "~/c.txt", "held_out": "~/h.txt"}
    path = write(tmp_path, run="~/runs/x", model="~/m", prompts=prompts, evaluation={"recognizer": "~/r"})
    workers = ["workers.sharding=deepspeed", "workers.offload=nvme", "workers.offload_path=~/n"]
    config = load_config(Path("~/run.yaml"), workers)
    found: list[Any] = [config.run, config.model, config.prompts.calibration, config.prompts.held_out]
    found += [config.evaluation.recognizer, config.workers.offload_path]
    assert found == [tmp_path / name for name in ("runs/x", "m", "c.txt", "h.txt", "r", "n")]
    assert load_config(path, ["run=~/other"]).run == tmp_path / "other"
    study = tmp_path / "study.yaml"
    settings = [{"name": "one", "set": {"method": "rtn"}}]
    study.write_text(yaml.safe_dump({"study": "~/s", "config": "~/run.yaml", "settings": settings}))
    assert load_study(Path("~/study.yaml")).location == tmp_path / "s"
    (tmp_path / "c.txt").write_text("a prompt\n")
    assert texts(Path("~/c.txt"), 1, "calibration") == ["a prompt"]
    assert parse_location("a/~/b") == Path("a/~/b")
    assert "~nobody-at-all" in " ".join(problems_of(path, "run=~nobody-at-all/x", "model=~nobody-at-all/y"))


def test_keys_that_stand_twice_are_named_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    prompts = "prompts:\n  calibration: c\n  held_out: h\n  calibration: d\n"
    path.write_text(f"run: r\nmodel: m\n{prompts}seed: 1\nseed: 2\nmodel: n\n")
    found = {problem.split()[1]: re.findall(r"\d+", problem.split("lines")[1]) for problem in problems_of(path)}
    assert found == {"calibration": ["4", "6"], "seed": ["7", "8"], "model": ["2", "9"]}
    path.write_text(
        "base: &b {seed: 1}\nx: {<<: *b, seed: 2}\nrun: r\nmodel: m\nprompts: {calibration: c, held_out: h}\n"
    )
    assert problems_of(path) == (f"{path}: base: unknown key", f"{path}: x: unknown key"), "a merge may be overridden"
    assert "weight" in problems_of(write(tmp_path), "bits={weight: 4, weight: 5}")[0]
    path.write_text("run: !!python/object/apply:os.system ['true']\n")
    assert "python/object" in problems_of(path)[0], "plain values only"


def test_the_file_of_a_study_is_no_run_and_the_other_way_round(tmp_path: Path) -> None:
    path = write(tmp_path)
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"study": "s", "config": str(path), "settings": [{"name": "one"}]}))
    [problem] = problems_of(study)
    assert f"`study {study}`" in problem
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert f"`run {path}`" in str(caught.value)


def test_a_feature_that_the_latents_cannot_give_is_refused_before_the_run(tmp_path: Path) -> None:
    digits = Path(__file__).resolve().parents[2] / "assets" / "hunyuanvideo-digits"
    model = tmp_path / "model"
    shutil.copytree(digits, model)
    scheduler = model / "scheduler" / "scheduler_config.json"
    chosen = {"strategy": "salience", "num_samples": 2, "diffusion_feature": "output"}

    def context(**changes: Any) -> RunContext:
        values = {**LEAST, "model": str(model), "selection": chosen, **changes}
        (tmp_path / "c.txt").write_text("the digit 3\n")
        (tmp_path / "h.txt").write_text("the digit 4\n")
        files = {"calibration": str(tmp_path / "c.txt"), "held_out": str(tmp_path / "h.txt")}
        values["prompts"] = {**files, "num_calibration": 1, "num_held_out": 1}
        return build_context(parse_config(values, "test"), weights=False)

    def problems(**changes: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            context(**changes)
        return [problem for problem in caught.value.problems if "selection.diffusion_feature is output" in problem]

    context()
    context(selection={**chosen, "strategy": "uniform"}, numerics={"dtype": "bfloat16"})
    assert names(problems(numerics={"dtype": "bfloat16"})[0], "numerics.dtype", "bfloat16")
    assert names(problems(workers={"num_gpus": 1})[0], "workers.num_gpus", 1)
    scheduler.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}))
    assert len(problems(workers={"num_gpus": 1})) == 2
    [problem] = problems()
    assert "UniPCMultistepScheduler" in problem


def test_added_keys_are_left_out_until_they_are_used(tmp_path: Path) -> None:
    """Runs that were made before there were such keys go on."""
    plain = parse_config(LEAST, "test")
    assert "diffusion_feature" not in plain.identity()["selection"]
    used = parse_config({**LEAST, "selection": {"diffusion_feature": "denoised"}}, "test")
    assert used.identity()["selection"]["diffusion_feature"] == "denoised"
    assert RunConfig.model_validate({**used.identity(), "run": "r"}).selection == used.selection


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ({"residual": {"order": 2, "gain": [0.9]}}, ("residual.gain", "order is 2")),
        ({"residual": {"order": 1, "gain": []}}, ("residual.gain is empty",)),
        ({"residual": {"order": 1, "gain": [0.9, 3.0]}}, ("gain", "3.0")),
        ({"residual": {"order": 1, "gain": "fitted"}}, ("gain", "'fitted'")),
        ({"residual": {"order": 0}, "refresh_steps": "placed"}, ("refresh_steps", "residual.order is 0")),
        ({"refresh_steps": []}, ("refresh_steps is []",)),
        ({"refresh_steps": [4, 2]}, ("[4, 2]", "ascending")),
        ({"refresh_steps": [-1, 2]}, ("refresh_steps", "-1")),
        ({"refresh_steps": "placed", "head_kinds": "online"}, ("head_kinds is online", "placed")),
    ],
)
def test_residuals_that_cannot_be_are_refused(
    tmp_path: Path, attention: dict[str, Any], words: tuple[str, ...]
) -> None:
    method = {"preset": "s2q_quantsparse", "attention": attention}
    said = "\n".join(problems_of(write(tmp_path, method=method)))
    assert all(word in said for word in words), said


def test_residuals_of_all_kinds_are_configured(tmp_path: Path) -> None:
    def configured(**attention: Any) -> Recipe:
        return load_config(write(tmp_path, method={"preset": "s2q_quantsparse", "attention": attention})).method

    preset = configured().attention
    assert (preset.refresh_steps, preset.residual.order, preset.residual.gain) == ("placed", 1, "calibrated")
    assert configured().is_refined
    # What is measured for the preset's residual goes with it.
    for other in ({"residual": {"order": 2}}, {"residual": {"order": 0}}, {"head_kinds": "online"}):
        plain = configured(**other)
        dumped = plain.to_dict()["attention"]
        assert not {"refresh_steps", "gain"} & {*dumped, *dumped["residual"]}, "runs made before go on"
        assert not plain.is_refined
    assert configured(residual={"order": 2}, refresh_steps="placed").attention.refresh_steps == "placed"
    given = configured(refresh_steps=[0, 3, 7], residual={"order": 1, "gain": [0.9, 0.8], "extrapolation": "adjacent"})
    assert (given.attention.refresh_steps, given.attention.residual.gain) == ((0, 3, 7), (0.9, 0.8))
    assert given.to_dict()["attention"]["refresh_steps"] == [0, 3, 7]
    assert not given.is_refined
    for measured in ({"refresh_steps": "placed"}, {"residual": {"order": 1, "gain": "calibrated"}}):
        assert configured(**measured).is_refined
        assert not configured(**measured, density=1.0).is_refined, "dense attention has no residual"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("refresh_steps=foo", "method.attention.refresh_steps: must be a list or 'placed' (it is 'foo')"),
        ("residual.gain=0.5", "method.attention.residual.gain: must be a list or 'calibrated' (it is 0.5)"),
        ("residual.gain=[3]", "method.attention.residual.gain.0: Input should be less than or equal to 2 (it is 3)"),
    ],
)
def test_a_value_of_none_of_several_kinds_is_one_mistake(tmp_path: Path, change: str, said: str) -> None:
    path = write(tmp_path, method="s2q_quantsparse")
    assert problems_of(path, f"method.attention.{change}") == (f"{path}: {said}",)


def test_every_mistake_inside_a_list_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, method="s2q_quantsparse")
    found = problems_of(path, "method.attention.residual.gain=[3, 1, -1]")
    assert len(found) == 2
    assert names(found[0], "residual.gain.0", 3)
    assert names(found[1], "residual.gain.2", -1)


def test_a_stored_method_is_the_same_method(tmp_path: Path) -> None:
    """Also where it has nothing of what its preset has."""
    none = {"refresh_steps": None, "residual": {"gain": None}}
    for attention in (
        {},
        none,
        {"refresh_steps": None},
        {"residual": {"gain": None}},
        {"residual": {"order": 2}},
        {"density": 1.0},
    ):
        config = load_config(write(tmp_path, method={"preset": "s2q_quantsparse", "attention": attention}))
        stored = json.loads(config.model_dump_json())
        assert RunConfig.model_validate(stored).method == config.method, attention


SPARSE_METHOD = {
    "preset": "s2q_quantsparse",
    "attention": {"density": 0.25, "residual": {"order": 1, "gain": "calibrated"}},
}


def context_with(folder: Path, settings: dict[str, Any], method: Any = SPARSE_METHOD) -> RunContext:
    (folder / "c.txt").write_text("the digit 3\n")
    (folder / "h.txt").write_text("the digit 4\n")
    files = {"calibration": str(folder / "c.txt"), "held_out": str(folder / "h.txt")}
    values = {
        **LEAST,
        "model": str(Path(__file__).resolve().parents[2] / "assets" / "hunyuanvideo-digits"),
        "generation": {"height": 80, "width": 96, "num_frames": 29, "num_inference_steps": 10},
        "prompts": {**files, "num_calibration": 1, "num_held_out": 1},
        "selection": {"num_samples": 2},
        "method": method,
        "evaluation": {"settings": settings},
    }
    return build_context(parse_config(values, "test"), weights=False)


@pytest.mark.parametrize("name", ["full_precision", "noise_floor", "s2q_quantsparse"])
def test_a_setting_of_the_evaluation_has_a_name_of_its_own(tmp_path: Path, name: str) -> None:
    with raises(ConfigError, f"evaluation.settings.{name}", "take another"):
        context_with(tmp_path, {name: {"density": 0.3}})


def test_a_method_without_a_sparse_step_is_refused(tmp_path: Path) -> None:
    with raises(ConfigError, "attention.interval is 1", "attention.density"):
        context_with(tmp_path, {}, {"preset": "s2q_quantsparse", "attention": {"interval": 1}})


def test_settings_of_the_checkpoint_are_checked_before_the_run(tmp_path: Path) -> None:
    good: dict[str, dict[str, Any]] = {
        "thin": {"density": 0.15, "dense_steps": 3, "interval": 4, "precision": "int8_fp8"},
        "placed": {"refresh_steps": [0, 4, 7], "residual": {"order": 2, "gain": None, "rank": None, "storage": "full"}},
        "bare": {"dense_steps": 5, "residual": {"order": 0, "gain": None}},
        "dense": {"enabled": False, "step_protection": False},
    }
    context = context_with(tmp_path, good)
    found = {name: setting.knobs() for name, setting in context.config.evaluation.settings.items()}
    assert found == {**good, "placed": {**good["placed"], "refresh_steps": (0, 4, 7)}}
    stored = context.config.identity()
    assert RunConfig.model_validate({**stored, "run": "r"}).evaluation.settings["placed"].knobs() == found["placed"]
    assert "settings" not in parse_config(LEAST, "test").identity()["evaluation"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"a": {"dense_steps": 10}}, ("settings.a", "dense_steps", 10, 9)),
        ({"a": {"residual": {"order": 2}}}, ("residual.gain", "residual.order", 2)),
        (
            {"a": {"residual": {"rank": 65}}, "b": {"refresh_steps": [9, 10]}},
            ("settings.a", "65", "settings.b", "(9, 10)"),
        ),
        ({"a": {"densty": 0.2}}, ("settings.a.densty",)),
        ({"a": {"density": 1.5}}, ("settings.a.density", "1.5")),
        ({"A b": {}}, ("settings.A b",)),
        ({"s2q_quantsparse": {}}, ("settings.s2q_quantsparse",)),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, settings: dict[str, Any], words: tuple[object, ...]
) -> None:
    with raises(ConfigError, *words):
        context_with(tmp_path, settings)


def test_a_dense_checkpoint_has_its_protected_steps_to_change_alone(tmp_path: Path) -> None:
    protected = {"preset": "rtn", "protected_steps": 2}
    context_with(tmp_path, {"plain": {"step_protection": False}}, protected)
    for settings, method, words in (
        ({"a": {"density": 0.5, "enabled": False}}, protected, ["evaluation.settings.a", "density", "enabled", "rtn"]),
        ({"a": {"step_protection": False}}, "rtn", ["evaluation.settings.a", "step_protection", "protected_steps", 0]),
    ):
        with raises(ConfigError, *words):
            context_with(tmp_path, settings, method)
