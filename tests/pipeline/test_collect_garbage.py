"""`gc` removes what no named run lists, nothing young, and only when asked to."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.collect_garbage import find_garbage
from storage.cache import UnitRecord, fingerprint
from storage.folder import Folder
from storage.location import Location, parse_location
from storage.run_directory import RunDirectory
from tests.errors import names, raises
from tests.pipeline.small_run import call, list_units, record_unit
from tests.s3_server import new_prefix

DEAD = "d" * 16
"""The attempt of a killed worker."""


def grow_old(folder: Path, seconds: float = 25 * 3600) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def run_of(place: Location, cache: Location, *units: str) -> RunDirectory:
    """A run that has done and listed these trajectories."""
    run = RunDirectory.open_or_create(place, {}, {}, cache=cache)
    for unit in units:
        record_unit(run, "trajectories", unit, {}, content=unit.encode() * 100)
    list_units(run, "trajectories", *units, "not-done")
    return run


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunDirectory, RunDirectory]:
    """Two runs that share a cache and one of their units, and what neither needs."""
    cache = tmp_path / "cache"
    first, second = run_of(tmp_path / "first", cache, "a", "shared"), run_of(tmp_path / "second", cache, "b")
    list_units(second, "trajectories", "shared")
    record_unit(first, "trajectories", "older", {}, content=b"of another configuration")
    dead = cache / "trajectories" / fingerprint({"trajectories": "a"}) / DEAD
    dead.mkdir()
    (dead / "file").write_bytes(b"of a killed worker")
    grow_old(cache)
    return first, second


def kept(run: RunDirectory) -> dict[str, UnitRecord | None]:
    return {name: run.cache.read("trajectories", fingerprint({"trajectories": name})) for name in ("a", "b", "shared")}


def test_what_no_run_lists_goes_when_asked_for(runs: tuple[RunDirectory, RunDirectory], tmp_path: Path) -> None:
    first, second = runs
    arguments = ("gc", str(tmp_path / "first" / ".." / "cache"), "--runs", str(first.path), "--runs", str(second.path))
    before = sorted(tmp_path.rglob("*"))
    asked = call(*arguments)
    assert asked.returncode == 0, asked.stdout
    assert names(asked.stdout, "Trajectories", "2 folders", "--delete")
    assert sorted(tmp_path.rglob("*")) == before
    done = call(*arguments, "--delete")
    assert done.returncode == 0, done.stdout
    gone = [path for path in before if not path.exists()]
    assert {path.parent.name if path.is_file() else path.name for path in gone} >= {DEAD}
    assert first.cache.read("trajectories", fingerprint({"trajectories": "older"})) is None
    assert list(first.cache.dead_attempts()) == []
    for run in runs:
        assert all(record is not None for record in kept(run).values())
        for record in kept(run).values():
            assert record is not None
            assert run.cache.problems(record, Folder(run.path), deep=True) == []
    assert "Nothing to remove" in call(*arguments).stdout


def test_a_run_that_is_not_named_loses_its_units_and_nothing_young_goes(
    runs: tuple[RunDirectory, RunDirectory], tmp_path: Path
) -> None:
    first, _ = runs
    grow_old(tmp_path / "cache", 23 * 3600)
    arguments = ("gc", str(tmp_path / "cache"), "--runs", str(first.path), "--delete")
    young = call(*arguments)
    assert names(young.stdout, "3 more folders", "kept")
    assert all(record is not None for record in kept(first).values())
    grow_old(tmp_path / "cache")
    assert call(*arguments).returncode == 0
    assert {name for name, record in kept(first).items() if record is None} == {"b"}


@pytest.mark.parametrize("change", ["another cache", "no units", "no run"])
def test_runs_that_say_nothing_of_the_cache_are_refused(
    runs: tuple[RunDirectory, RunDirectory], tmp_path: Path, change: str
) -> None:
    wrong: dict[str, Callable[[], Path]] = {
        "another cache": lambda: run_of(tmp_path / "third", tmp_path / "third" / "cache", "a").path,
        "no units": lambda: RunDirectory.open_or_create(tmp_path / "third", {}, {}, cache=tmp_path / "cache").path,
        "no run": lambda: tmp_path / "cache",
    }
    place = wrong[change]()
    arguments = ("gc", str(tmp_path / "cache"), "--runs", str(runs[0].path), "--runs", str(place), "--delete")
    before = sorted((tmp_path / "cache").rglob("*"))
    refused = call(*arguments)
    assert refused.returncode == 1
    assert str(place) in refused.stdout.replace("\n", "")
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_a_study_s_folder_that_is_no_run_is_refused(runs: tuple[RunDirectory, RunDirectory], tmp_path: Path) -> None:
    first, _ = runs
    (tmp_path / "study" / "seed-0").mkdir(parents=True)
    (tmp_path / "study" / "study.json").write_text("{}")
    place = tmp_path / "study" / "seed-0" / "s2q"
    run_of(place, tmp_path / "cache", "b")
    (place / "config.json").unlink()
    with raises(ValueError, place, "config.json"):
        find_garbage(tmp_path / "cache", [first.path, tmp_path / "study"])


@pytest.mark.usefixtures("s3")
def test_a_bucket_is_young() -> None:
    place = parse_location(new_prefix("run"))
    run = run_of(place, place / "cache", "a")
    record_unit(run, "trajectories", "older", {}, content=b"x")
    done = call("gc", f"{place}/cache", "--runs", str(place), "--delete")
    assert done.returncode == 0, done.stdout
    assert names(done.stdout, "1 more folder", "kept")
