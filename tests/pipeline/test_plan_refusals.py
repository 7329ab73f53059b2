"""A run directory that `run` would refuse is among the reasons of `plan`."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config.loading import load_config
from pipeline.config.schema import RunConfig
from pipeline.plan import plan_config
from pipeline.planning.machine import lock_notes, refusals
from pipeline.runner import open_run
from pipeline.study.expansion import STUDY_FILE, load_study
from pipeline.study.preparation import prepare_study
from storage.location import local_path
from storage.run_directory import FORMAT_VERSION, RunDirectory
from tests.errors import names
from tests.pipeline.small_run import small_run
from tests.pipeline.test_study import small_study

Place = Callable[[Path, RunConfig], object]


def made_with_other_settings(run: Path, config: RunConfig) -> None:
    RunDirectory.open_or_create(run, {**config.identity(), "seed": config.seed + 3}, {})


def of_a_newer_program(run: Path, config: RunConfig) -> None:
    RunDirectory.open_or_create(run, config.identity(), {})
    document = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(document | {"format_version": FORMAT_VERSION + 1}))


def with_foreign_files(run: Path, config: RunConfig) -> None:
    (run / "thesis").mkdir(parents=True)
    (run / "notes.txt").write_text("x")


def with_a_damaged_configuration(run: Path, config: RunConfig) -> None:
    run.mkdir()
    (run / "config.json").write_text("{")


def test_a_cache_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    model = load_config(small_run(tmp_path)).model
    (tmp_path / "photos" / "2020").mkdir(parents=True)
    for cache in (tmp_path / "file" / "cache", model / "cache", tmp_path):
        plan = plan_config(load_config(small_run(tmp_path, cache=str(cache), method="rtn")))
        [problem] = plan.problems
        assert problem.startswith(f"cache: {cache} ")


@pytest.mark.parametrize(
    ("place", "named"),
    [
        (made_with_other_settings, ["seed", "--update"]),
        (of_a_newer_program, [str(FORMAT_VERSION + 1)]),
        (with_foreign_files, ["notes.txt", "thesis"]),
        (with_a_damaged_configuration, ["config.json"]),
    ],
)
def test_reasons(tmp_path: Path, place: Place, named: list[str]) -> None:
    config = load_config(small_run(tmp_path))
    run = tmp_path / "run"
    assert refusals(config, update=False) == []
    place(run, config)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    [problem] = refusals(config, update=False)
    assert problem.startswith(f"run: {run}") or str(run / "config.json") in problem
    assert all(part in problem for part in named)
    assert bool(refusals(config, update=True)) == (place is not made_with_other_settings)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_may_go_on(tmp_path: Path) -> None:
    config = load_config(small_run(tmp_path))
    RunDirectory.open_or_create(tmp_path / "run", config.identity(), {})
    assert refusals(config, update=False) == []


def test_a_run_in_use_is_a_note(tmp_path: Path) -> None:
    assert lock_notes(tmp_path / "none") == []
    directory = RunDirectory.open_or_create(tmp_path / "run", {}, {})
    assert lock_notes(directory.path) == []
    with directory.lock():
        [note] = lock_notes(directory.path)
    assert str(os.getpid()) in note
    assert lock_notes(directory.path) == []


@pytest.mark.parametrize("command", [("plan",), ("plan", "--shapes-only"), ("run",)])
def test_what_run_refuses_plan_says(tmp_path: Path, command: tuple[str, ...]) -> None:
    config = small_run(tmp_path)
    with_foreign_files(tmp_path / "run", load_config(config))
    name, *options = command
    result = CliRunner().invoke(app, [name, str(config), *options])
    assert result.exit_code == (0 if options else 1)  # shapes are planned for another machine, whose folders are others
    assert "notes.txt" in result.output


def test_a_study_says_it_too(tmp_path: Path) -> None:
    path = small_study(tmp_path)
    first, *_ = load_study(path).runs
    with_foreign_files(tmp_path / "study", first.config)
    [foreign] = prepare_study(load_study(path)).problems
    assert foreign.startswith(f"study: {tmp_path / 'study'} ")
    assert "notes.txt" in foreign
    (tmp_path / "study" / STUDY_FILE).write_text("{}")
    made_with_other_settings(local_path(first.location, why="is in no bucket"), first.config)
    [changed] = prepare_study(load_study(path)).problems
    assert changed.startswith(f"run: {first.location} ")
    assert "seed" in changed
    assert prepare_study(load_study(path), update=True).problems == []


def test_a_study_says_which_prompts_of_its_runs_are_others(tmp_path: Path) -> None:
    path = small_study(tmp_path)
    first, *others = prepare_study(load_study(path)).contexts.values()
    open_run(first, update=False)
    (tmp_path / "study" / STUDY_FILE).write_text("{}")
    file = first.config.prompts.calibration
    file.write_text(f"a changed one\n{file.read_text()}")
    [problem] = prepare_study(load_study(path)).problems
    assert others
    assert names(problem, first.config.run, "prompts.calibration", file, "line 1", "--update")
    assert prepare_study(load_study(path), update=True).problems == []
