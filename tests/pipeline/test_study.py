"""Studies: their file and all that can be wrong with it, and some for real."""

import csv
import io
import json
import logging
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config.loading import ConfigError
from pipeline.event_log import read_events
from pipeline.run_state import read_status
from pipeline.runner import stages_until
from pipeline.study.command import do_study, plan_study
from pipeline.study.expansion import load_study, slug_of
from pipeline.study.preparation import prepare_study
from storage.location import parse_location
from storage.lock import RunLocked
from storage.open_place import open_place
from storage.run_directory import RunDirectory
from tests.errors import names, raises
from tests.pipeline.small_run import ROOT, Recorded, call, files, small_run
from tests.s3_server import S3Server, new_prefix

BASE: dict[str, Any] = {"run": "ignored", "model": "m", "prompts": {"calibration": "c.txt", "held_out": "h.txt"}}
NAIVE: dict[str, Any] = {"name": "naive", "set": {"method": "quarot"}}


def write(folder: Path, base: dict[str, Any] | None = None, **changes: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE if base is None else base))
    study = {"study": str(folder / "study"), "config": str(folder / "base.yaml"), "settings": [NAIVE], **changes}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def problems_of(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        load_study(path, overrides)
    assert all(problem.startswith(str(path.parent)) for problem in raised.value.problems)
    return tuple(problem.partition(": ")[2] for problem in raised.value.problems)


def test_every_combination_of_the_axes_with_every_seed_is_a_run(tmp_path: Path) -> None:
    grid = {
        "name": "samples {selection.num_samples}, segments {distillation.segment_length}",
        "set": {"method": {"preset": "s2q", "epochs": 3}, "method.damping": 0.5},
        "axes": {"selection.num_samples": [3, 7], "distillation.segment_length": [1, "all"]},
    }
    path = write(
        tmp_path, set={"method": "rtn", "bits.weight": 6}, settings=[NAIVE, grid], seeds=[0, 5], noise_floor=True
    )
    study = load_study(path, ["workers.num_workers=1"])
    names = [setting.name for setting in study.settings]
    assert names == [
        "naive", "samples 3, segments 1", "samples 3, segments all", "samples 7, segments 1", "samples 7, segments all",
    ]  # fmt: skip
    assert [run.label for run in study.runs][4:6] == ["seed-0/samples-7-segments-all", "seed-5/naive"]
    configs = {run.label: run.config for run in study.runs}
    assert len(configs) == 10
    last = configs["seed-5/samples-7-segments-all"]
    assert (last.seed, last.run) == (5, tmp_path / "study" / "seed-5" / "samples-7-segments-all")
    assert (last.selection.num_samples, last.distillation.segment_length, last.bits.weight) == (7, "all", 6)
    assert (last.method.preset, last.method.epochs, last.method.damping) == ("s2q", 3, 0.5)
    assert configs["seed-0/naive"].method.preset == "quarot", "a setting's method replaces the study's"
    assert all(config.evaluation.noise_floor and config.workers.num_workers == 1 for config in configs.values())
    assert [setting.group for setting in study.settings] == [0, 1, 1, 1, 1]
    assert {config.evaluation_seed for config in configs.values()} == {0}, "all calibrations meet the same noises"
    given = load_study(path, ["evaluation.seed=9"])
    assert {run.config.evaluation_seed for run in given.runs} == {9}


def test_other_settings_of_a_checkpoint_are_rows_below_its_own(tmp_path: Path) -> None:
    path = small_study(tmp_path)
    document = yaml.safe_load(path.read_text())
    thin = {"density": 0.3, "dense_steps": 1}
    document["settings"][1]["set"] = {"method": "s2q_quantsparse", "evaluation.settings": {"thin": thin}}
    document |= {"reference": "gptq 0.01 / thin"}
    path.write_text(yaml.safe_dump(document))
    study = load_study(path)
    assert [row.name for row in study.rows] == ["naive <b>", "gptq 0.01", "gptq 0.01 / thin"]
    assert study.rows[2].overrides["evaluation.settings.thin"] == thin
    assert len(study.runs) == 4, "no run of their own"
    document |= {"reference": "gptq 0.01 / thick"}
    path.write_text(yaml.safe_dump(document))
    with raises(ConfigError, "reference", "'gptq 0.01 / thick'", "'gptq 0.01 / thin'"):
        load_study(path)


def test_a_key_inside_a_method_that_is_only_a_name(tmp_path: Path) -> None:
    setting = {"name": "{method.damping}", "set": {"method": "gptq"}, "axes": {"method.damping": [0.25]}}
    [run] = load_study(write(tmp_path, base={**BASE, "method": "rtn"}, settings=[setting])).runs
    assert (run.config.method.preset, run.config.method.damping) == ("gptq", 0.25)


MISTAKES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"sets": {}}, ("sets:",)),
    ({"settings": []}, ("settings",)),
    ({"settings": [{"name": "a", "axis": {}}]}, ("settings.0.axis:",)),
    ({"settings": [{"name": "a", "axes": {"seed": []}}]}, ("the axis seed",)),
    ({"settings": [{"name": "{k}", "set": {"k": 1}, "axes": {"k": [1]}}]}, ("k is in set and in axes",)),
    ({"study": "gs://bucket/study"}, ("gs://bucket/study", "s3://bucket/prefix")),
    ({"seeds": [1, 1]}, ("seeds", "[1, 1]")),
    ({"seeds": [-1]}, ("seeds", "[-1]")),
    ({"seeds": []}, ("seeds", "[]")),
    ({"settings": [NAIVE, NAIVE]}, ("2", "'naive'")),
    ({"settings": [{"name": "a", "axes": {"bits.weight": [3, 4]}}]}, ("2", "'a'", "{key}")),
    ({"settings": [{"name": "{bits.weigth}", "axes": {"bits.weight": [3, 4]}}]}, ("{bits.weigth}", "bits.weight")),
    ({"settings": [{"name": "A b"}, {"name": "a/b"}]}, ("'A b' and 'a/b'", "'a-b'")),
    ({"reference": "best"}, ("reference:", "'best'", "'naive'")),
    ({"set": {"run": "x"}}, ("set: run",)),
    ({"settings": [{"name": "{seed}", "axes": {"seed": [1]}}]}, ("setting '{seed}': seed", "`seeds`")),
    ({"settings": [NAIVE, {"name": "b", "set": {"bits.weight": 1}}]}, ("setting 'b': bits.weight:", "it is 1")),
    ({"settings": [NAIVE, {"name": "b", "set": {"method": "nothing"}}]}, ("setting 'b': method:", "'nothing'")),
    ({"settings": [NAIVE, {"name": "b", "set": {"model.x": 1}}]}, ("setting 'b': model.x=1:", "model is 'm'")),
    ({"settings": [NAIVE, {"name": "b", "set": {"compare": ["rtn", "gptq"]}}]}, ("setting 'b': compare", "rtn, gptq")),
    ({"settings": [NAIVE, {"name": "b", "set": {"workers.num_workers": 7}}]}, ("workers",)),
]
"""Changes of the study, and what the message names; whole messages stand in tests/golden/messages.txt."""


@pytest.mark.parametrize(("changes", "expected"), MISTAKES)
def test_mistake_is_named(tmp_path: Path, changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    [problem] = problems_of(write(tmp_path, **changes))
    assert [part for part in expected if part not in problem] == []


def test_all_mistakes_at_once_and_common_ones_once(tmp_path: Path) -> None:
    settings = [
        NAIVE,
        {"name": "b", "set": {"selection.strategy": "best"}},
        {"name": "c{x}", "set": {"method.epochs": -1}},
        {"name": "d", "set": {"run": 1}},
    ]
    path = write(tmp_path, base={**BASE, "unknown": 1}, settings=settings, seeds=[0, 1], reference="nobody")
    problems = problems_of(path)
    named = ("setting 'c{x}'", "x"), ("setting 'd'", "run"), ("reference", "'nobody'")
    common = (tmp_path / "base.yaml", "unknown")
    for problem, words in zip(problems, (*named, common, ("setting 'b'", "selection.strategy")), strict=True):
        assert names(problem, *words)


def test_missing_files(tmp_path: Path) -> None:
    path = write(tmp_path, config=str(tmp_path / "nowhere.yaml"))
    with raises(ConfigError, tmp_path / "nowhere.yaml"):
        load_study(path)
    with raises(ConfigError, tmp_path / "gone.yaml"):
        load_study(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("interval 5", "interval-5"), ("../../etc", "etc"), ("a/b\\c", "a-b-c"), (".hidden", "hidden"), ("日本", "setting"),
        ("W4A6 + gptq=on", "W4A6-+-gptq=on"), ("x" * 300, "x" * 100), ("<b>&", "b"),
    ],
)  # fmt: skip
def test_slug_is_a_safe_folder(name: str, slug: str) -> None:
    assert slug_of(name) == slug


def test_a_study_s_file_needs_no_torch() -> None:
    code = "import sys, pipeline.study.expansion; print([n for n in ('torch', 'ray', 'diffusers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def small_study(folder: Path, **changes: Any) -> Path:
    """Two sound methods and one that diverges, on the small model."""
    base = small_run(folder)
    document = {
        "study": str(folder / "study"),
        "config": str(base),
        "set": {"selection": {"strategy": "uniform", "num_samples": 2}, "workers.max_attempts": 1},
        "seeds": [3, 4],
        "reference": "naive <b>",
        "noise_floor": True,
        "settings": [
            {"name": "naive <b>", "set": {"method": {"preset": "quarot", "rotation_block": 64}}},
            {"name": "gptq {method.damping}", "set": {"method": "gptq"}, "axes": {"method.damping": [0.01]}},
        ],
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_units_are_counted_once_where_runs_share_them(tmp_path: Path) -> None:
    prepared = prepare_study(load_study(small_study(tmp_path)))
    counts = {count.name: (count.separate, count.shared, count.at_most) for count in prepared.counts}
    assert prepared.problems == []
    assert {name: counts[name] for name in ("trajectories", "selection", "activations")} == {
        "trajectories": (8, 4, False), "selection": (4, 2, False), "activations": (4, 4, False),
    }  # fmt: skip
    # Of each run the video and the velocity of full precision, noise floor and its method, and the weights of the steps.
    assert counts["evaluation"] == (24, 12, False), "all but the method's once for all seeds"
    assert not (tmp_path / "study").exists()
    early = prepare_study(load_study(small_study(tmp_path)), stages_until("distillation")).counts
    assert early == prepared.counts[: len(early)]
    assert early[-1].name == "distillation"
    several = small_study(
        tmp_path,
        seeds=[0],
        reference=None,
        settings=[
            {
                "name": "{selection.strategy}",
                "set": {"method": "gptq"},
                "axes": {"selection.strategy": ["uniform", "random"]},
            }
        ],
    )
    found = {count.name: count for count in prepare_study(load_study(several)).counts}
    assert (found["activations"].shared, found["activations"].at_most) == (4, True)
    assert (found["trajectories"].shared, found["trajectories"].at_most) == (2, False)


def test_infeasible_study_says_everything_before_any_work(tmp_path: Path) -> None:
    path = small_study(tmp_path, set={"workers.num_workers": 0, "generation.max_sequence_length": 500})
    console = Console(file=io.StringIO(), width=500)
    assert not plan_study(path, (), console)
    with pytest.raises(ConfigError) as refused:
        do_study(path, (), console, update=False)
    for text in (console.file.getvalue(), str(refused.value)):  # type: ignore[attr-defined]
        assert names(text, "generation.max_sequence_length", 500, "workers.num_workers", 0)
    assert not (tmp_path / "study").exists()


def test_what_is_wrong_with_a_setting_has_its_name(tmp_path: Path) -> None:
    """And what is wrong with all, once and without."""
    (tmp_path / "bad.jsonl").write_text("a bird")
    settings = [
        {
            "name": "bad {method}",
            "set": {"prompts.held_out": f"{tmp_path}/bad.jsonl"},
            "axes": {"method": ["rtn", "gptq"]},
        },
        {"name": "good", "set": {}},
    ]
    path = small_study(tmp_path, settings=settings, reference="good", set={"prompts.calibration": "gone.txt"})
    with pytest.raises(ConfigError) as refused:
        prepare_study(load_study(path))
    common, own = sorted(refused.value.problems, key=lambda problem: "setting" in problem)
    assert common.startswith("prompts.calibration: gone.txt ")
    assert names(own, "'bad rtn'", "'bad gptq'", "prompts.held_out", tmp_path / "bad.jsonl", "line 1")
    assert "good" not in own


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "diary.txt").touch()
    with raises(ValueError, tmp_path / "study", "diary.txt"):
        do_study(small_study(tmp_path), (), Console(file=io.StringIO()), update=False)


def test_command_line_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])
    result = CliRunner().invoke(app, ["study", str(write(tmp_path, reference="[best]")), "--plan"])
    assert result.exit_code == 1
    assert names(result.output, "reference", "'[best]'")
    result = CliRunner().invoke(app, ["study", str(write(tmp_path)), "--plan", "--until", "distilation"])
    assert result.exit_code == 1
    assert names(result.output, "--until", "distilation", "trajectories")
    assert "Usage:" in CliRunner().invoke(app, ["study", "--help"]).output


@pytest.mark.ray
@pytest.mark.slow
def test_until_distillation_block_errors_are_compared(tmp_path: Path) -> None:
    path, study = small_study(tmp_path, seeds=[3], reference="gptq 0.01"), tmp_path / "study"
    document = yaml.safe_load(path.read_text())
    document["settings"][1]["axes"]["method.damping"] = [0.01, 0.1]
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    done = call("study", str(path), "--until", "distillation")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PSNR" not in done.stdout
    runs = {name: study / "seed-3" / name for name in ("naive-b", "gptq-0.01", "gptq-0.1")}
    assert not any((run / "checkpoint").exists() for run in runs.values())
    results = json.loads((study / "results.json").read_text())
    found = {setting["name"]: setting["seeds"]["3"] for setting in results["settings"]}
    assert all(result["prompts"] == {} for result in found.values())
    assert found["naive <b>"]["block_errors"] is None, "its method reads no activations"
    first, second = (found[name]["block_errors"] for name in ("gptq 0.01", "gptq 0.1"))
    assert first["basis"] == second["basis"], "the same samples"
    assert found["gptq 0.01"]["distilled_on"] == [Recorded(runs["gptq-0.01"]).records("distillation")[0].device]
    measured = {
        block: summary["loss_after"]
        for record in Recorded(runs["gptq-0.01"]).records("distillation")
        for block, summary in record.result["blocks"].items()
    }
    assert first["losses"] == measured
    assert len(measured) == 9
    apart = [10 * math.log10(second["losses"][block] / loss) for block, loss in measured.items()]
    rows = {row["setting"]: row for row in csv.DictReader((study / "results.csv").read_text().splitlines())}
    assert float(rows["gptq 0.1"]["block_error_difference_db"]) == pytest.approx(statistics.fmean(apart))
    assert rows["naive <b>"]["block_error_db"] == ""


@pytest.mark.ray
def test_runs_in_a_bucket_share_their_units(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = new_prefix("study")
    gptq = {"name": "gptq {method.damping}", "set": {"method": "gptq"}, "axes": {"method.damping": [0.01, 0.1]}}
    path = small_study(tmp_path, study=place, seeds=[3], reference="gptq 0.01", settings=[gptq])
    console = Console(file=io.StringIO(), width=500)
    assert plan_study(path, (), console)
    assert do_study(path, (), console, update=False, stages=stages_until("activations"))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "5 units done now, 5 shared with other runs" in said
    runs = [RunDirectory.open(f"{place}/seed-3/gptq-{damping}") for damping in ("0.01", "0.1")]
    first, second = (Recorded(run).records("activations")[0] for run in runs)
    assert first == second
    assert runs[0].cache.location == runs[1].cache.location == parse_location(place) / "cache"
    assert f"report:  {place}/study.html" in said

    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])
    copied = CliRunner().invoke(app, ["report", place])
    assert copied.exit_code == 0, copied.output
    for key in ("study.html", "results.csv"):
        assert (tmp_path / f"study-{key}").read_bytes() == open_place(place).read(key)
    shown = CliRunner().invoke(app, ["status", place]).output
    assert re.search(r"^seed-3/gptq-0\.1 +5 +- +distillation \?, assembly 1, evaluation 6$", shown, re.MULTILINE), shown
    assert "stopped: no driver" in shown
    assert "0 of 2 runs are finished." in shown
    with RunDirectory(place).lock():
        assert f"running: process {os.getpid()} on host" in CliRunner().invoke(app, ["status", place]).output


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_whole_study(tmp_path: Path) -> None:
    path, study = small_study(tmp_path, seeds=[3]), tmp_path / "study"
    diverging = {"preset": "s2q", "rotation_block": 64, "epochs": 1, "learning_rate_transform": 1e30}
    document = yaml.safe_load(path.read_text())
    document["set"]["distillation.segment_length"] = "all"
    document["settings"].insert(0, {"name": "diverges", "set": {"method": diverging}})
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    done = call("study", str(path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 3 runs failed, of the settings diverges" in done.stdout
    runs = {name: study / "seed-3" / name for name in ("diverges", "naive-b", "gptq-0.01")}

    finished = [
        (event["stage"], event["unit"], name)
        for name, run in runs.items()
        for event in read_events(run)
        if event["event"] == "unit_finished"
    ]
    for stage, expected in (("trajectories", 2), ("selection", 1), ("activations", 2)):
        assert len([unit for of, unit, _ in finished if of == stage]) == expected, "done once for all runs"
    shared = [unit for of, unit, _ in finished if of == "evaluation" and not unit.startswith(("quarot", "gptq"))]
    assert sorted(shared) == [
        "full_precision-prompt-000", "noise_floor-prompt-000", "noise_floor-velocity-000", "step_weights",
    ]  # fmt: skip
    shared = [Recorded(run).read("trajectories", "prompt-001") for run in runs.values()]
    assert shared[0] is not None
    assert shared[0] == shared[1] == shared[2]
    for name in ("naive-b", "gptq-0.01"):
        assert not read_status(runs[name]).to_do

    results = json.loads((study / "results.json").read_text())
    by_name = {setting["name"]: setting["seeds"]["3"] for setting in results["settings"]}
    assert "distillation/s2q-" in by_name["diverges"]["failure"]
    assert by_name["diverges"]["prompts"] == {}
    values = by_name["gptq 0.01"]["prompts"]["prompt-000"]
    assert 5 < values["psnr_db"] < 60
    assert by_name["gptq 0.01"]["compression"] > 3
    assert by_name["gptq 0.01"]["distillation_seconds"] > 0
    assert len(by_name["gptq 0.01"]["block_errors"]["losses"]) == 9
    assert 20 < results["noise_floor"]["3"]["prompt-000"]["psnr_db"] < 100
    assert values["velocity_sqnr_db"] + 5 < results["noise_floor"]["3"]["prompt-000"]["velocity_sqnr_db"] < 100
    assert len(by_name["gptq 0.01"]["velocity_errors"]["prompt-000"]["velocity_error"]) == 3
    assert len(by_name["gptq 0.01"]["step_weights"]) == 3
    lines = (study / "results.csv").read_text().splitlines()
    rows = {row["setting"]: row for row in csv.DictReader(lines)}
    assert rows["diverges"]["n"] == "0"
    assert rows["diverges"]["failed"].startswith("seed 3: distillation/s2q-")
    difference = values["psnr_db"] - by_name["naive <b>"]["prompts"]["prompt-000"]["psnr_db"]
    assert float(rows["gptq 0.01"]["difference_db"]) == pytest.approx(difference)
    page = (study / "study.html").read_text()
    assert "naive &lt;b&gt;" in page
    assert "naive <b>" not in page

    shown = CliRunner().invoke(app, ["status", str(study)]).output
    assert re.search(r"^seed-3/naive-b +\d+ +- +- *$", shown, re.MULTILINE), shown
    assert re.search(r"^seed-3/diverges .*distillation 1, assembly 1, evaluation 2 *$", shown, re.MULTILINE), shown
    assert "2 of 3 runs are finished." in shown

    # Once more, without the setting that fails; a lost file of one run comes back from another.
    before = files(runs["gptq-0.01"] / "checkpoint")
    document["settings"] = document["settings"][1:]
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    lost = next(Recorded(runs["naive-b"]).file("trajectories/prompt-000/latents").glob("c*"))
    lost.unlink()
    console = Console(file=io.StringIO(), width=500)
    assert do_study(path, (), console, update=False)
    again = console.file.getvalue()  # type: ignore[attr-defined]
    assert "seed-3/naive-b/trajectories/prompt-000 is redone" in again
    assert "1 unit done now, 1 shared with other runs" in again
    assert not lost.exists(), "another attempt"
    assert next(Recorded(runs["naive-b"]).file("trajectories/prompt-000/latents").glob("c*")).exists()
    assert files(runs["gptq-0.01"] / "checkpoint") == before
    with RunDirectory(study).lock(), raises(RunLocked, os.getpid()):
        do_study(path, (), console, update=False)
    document["settings"][0]["set"]["method"]["preset"] = "rtn"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    with raises(ConfigError, "method.preset", "quarot", "rtn"):
        do_study(path, (), console, update=False)
