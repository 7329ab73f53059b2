import json
import multiprocessing
import os
from pathlib import Path

import pytest

from storage.cache import Cache
from storage.lock import RunLocked, using
from storage.run_directory import (
    FORMAT_VERSION,
    ListedUnit,
    RunConfigMismatch,
    RunDirectory,
    RunFormatUnknown,
)
from storage.run_prompts import KeptPrompt, KeptPrompts
from tests.errors import raises

CONFIG = {"model": "tiny", "quantization": {"weight_bits": 4, "clip": None}, "prompts": ["a", "b"]}


def test_created_once_and_opened_again(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path / "deep" / "run", CONFIG, {"torch": "2.13"})
    again = RunDirectory.open_or_create(tmp_path / "deep" / "run", dict(reversed(CONFIG.items())), {"torch": "2.14"})
    assert again.config == CONFIG
    assert again.provenance == {"torch": "2.13"}
    assert RunDirectory.open(run).path == run.path
    document = json.loads((run.path / "config.json").read_bytes())
    assert document["format_version"] == FORMAT_VERSION
    assert Path(run) == run.path == tmp_path / "deep" / "run"


def test_parts_lie_where_the_design_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.open_or_create("run", CONFIG, {})
    assert run.path.is_absolute()
    base = tmp_path / "run"
    assert run.cache.location == base / "cache"
    assert run.checkpoint() == base / "checkpoint"
    assert run.checkpoint("gptq") == base / "checkpoints" / "gptq"
    assert (run.evaluation, run.logs, run.report) == (base / "evaluation", base / "logs", base / "report.html")
    for bad in ("../x", "a/b", "", "."):
        with raises(ValueError, "method name", repr(bad)):
            run.checkpoint(bad)


def test_different_config_lists_every_difference_and_the_ways_out(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path, CONFIG, {})
    other = {"model": "tiny", "quantization": {"weight_bits": 6, "clip": 0.9}, "prompts": ["a"], "new": {}}
    bits, clip, prompts = "quantization.weight_bits: 4 -> 6", "quantization.clip: null -> 0.9", '["a", "b"] -> ["a"]'
    with raises(RunConfigMismatch, bits, clip, "prompts", prompts, "new", "{}", "--update") as caught:
        RunDirectory.open_or_create(tmp_path, other, {})
    assert "model" not in str(caught.value)
    assert run.config == CONFIG


def prompts_of(file: str = "p.jsonl", *, name: str = "a.png", **second: str) -> dict[str, KeptPrompts]:
    """Two lines with an image each; `second` are contents of the second one."""
    first = KeptPrompt(2, {"prompt": "a", "image": "12"}, name)
    other = KeptPrompt(5, {"prompt": "b", "image": "34", **second}, "b.png")
    return {"calibration": KeptPrompts(file, (first, other)), "held_out": KeptPrompts("h.txt", (first,))}


@pytest.mark.parametrize("second", [{"prompt": "c"}, {"image": "56"}, {"negative_prompt": "blurred"}])
def test_other_prompts_are_refused_like_another_config(second: dict[str, str], tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path, CONFIG, {}, prompts=prompts_of())
    run.write_units({"trajectories": [ListedUnit("prompt-000", "0")]})
    assert run.prompts == prompts_of()
    RunDirectory.check_prompts(tmp_path, prompts_of())
    other = prompts_of(**second)
    words = ("prompts.calibration", "p.jsonl", "line 5", *second, "--update")
    for refused in (
        lambda: RunDirectory.check_prompts(tmp_path, other),
        lambda: RunDirectory.open_or_create(tmp_path, CONFIG, {}, prompts=other),
    ):
        with raises(RunConfigMismatch, *words) as caught:
            refused()
        assert "line 2" not in str(caught.value)
        assert "held_out" not in str(caught.value)
    with raises(RunConfigMismatch, "model", *words):
        RunDirectory.open_or_create(tmp_path, CONFIG | {"model": "x"}, {}, prompts=other)
    assert (run.prompts, set(run.units())) == (prompts_of(), {"trajectories"})
    RunDirectory.open_or_create(tmp_path, CONFIG, {}, prompts=other, update=True)
    assert (run.prompts, run.units()) == (other, {})


def test_prompts_that_are_the_same_under_other_names_or_not_kept_are_taken(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path, CONFIG, {})
    run.write_units({"trajectories": [ListedUnit("prompt-000", "0")]})
    assert run.prompts == {}, "of a run that began before they were kept"
    for found in (prompts_of(), prompts_of("q.jsonl", name="z.png")):
        RunDirectory.check_prompts(tmp_path, found)
        RunDirectory.open_or_create(tmp_path, CONFIG, {}, prompts=found)
        assert (run.prompts, set(run.units())) == (found, {"trajectories"})
    RunDirectory.check_prompts(
        tmp_path, {key: KeptPrompts("p", found.prompts[:1]) for key, found in prompts_of().items()}
    )
    RunDirectory.check_prompts(tmp_path / "nowhere", prompts_of())


def test_update_takes_the_new_config(tmp_path: Path) -> None:
    RunDirectory.open_or_create(tmp_path, CONFIG, {"commit": "1"})
    run = RunDirectory.open_or_create(tmp_path, CONFIG | {"model": "small"}, {"commit": "2"}, update=True)
    assert run.config["model"] == "small"
    assert run.provenance == {"commit": "2"}
    with raises(RunConfigMismatch, tmp_path, "model", "small", "tiny", "--update"):
        RunDirectory.open_or_create(tmp_path, CONFIG, {})


def test_update_waits_for_no_driver(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path, CONFIG, {})
    with run.lock(), pytest.raises(RunLocked):
        RunDirectory.open_or_create(tmp_path, CONFIG | {"model": "small"}, {}, update=True)
    assert run.config == CONFIG


@pytest.mark.parametrize("version", [1, FORMAT_VERSION + 1])
def test_another_format_is_refused(tmp_path: Path, version: int) -> None:
    run = RunDirectory.open_or_create(tmp_path, CONFIG, {})
    file = run.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"format_version": version}))
    for attempt in (RunDirectory.open, lambda path: RunDirectory.open_or_create(path, CONFIG, {}, update=True)):
        with raises(RunFormatUnknown, tmp_path, f"format {version}", FORMAT_VERSION, "another run directory"):
            attempt(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format_version": 2}'])
def test_unreadable_config_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with raises(ValueError, tmp_path / "config.json"):
        RunDirectory.open_or_create(tmp_path, CONFIG, {}, update=True)
    assert (tmp_path / "config.json").read_bytes() == content


def test_places_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with raises(ValueError, tmp_path / "home", "thesis.txt"):
        RunDirectory.open_or_create(tmp_path / "home", CONFIG, {})
    with raises(ValueError, tmp_path / "home", "config.json"):
        RunDirectory.open(tmp_path / "home")
    with raises(ValueError, tmp_path / "home" / "thesis.txt"):
        RunDirectory.open_or_create(tmp_path / "home" / "thesis.txt", CONFIG, {})
    with raises(ValueError, "gs://bucket/run", "s3://bucket/prefix"):
        RunDirectory.open_or_create("gs://bucket/run", CONFIG, {})


def test_what_a_kill_during_creation_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".config.json.12ab.partial").write_bytes(b"{")
    (tmp_path / "run.lock").write_bytes(b"")
    run = RunDirectory.open_or_create(tmp_path, CONFIG, {})
    with run.lock():
        run.sweep()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("partial")] == []


def test_attempts_that_no_record_names_go_where_nobody_else_uses_the_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    dead = tmp_path / "cache" / "trajectories" / ("f" * 32) / ("1" * 16)
    with using(cache.location, cache.sweep):
        dead.mkdir(parents=True)
        with using(cache.location, cache.sweep):
            assert dead.exists(), "it may be that of the other driver"
    with using(cache.location, cache.sweep):
        assert not dead.exists()


def test_a_refused_driver_changes_nothing(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path / "run", CONFIG, {})
    with run.lock(), raises(RunLocked, tmp_path / "run"):
        RunDirectory.open_or_create(tmp_path / "run", CONFIG, {}, cache=tmp_path / "other")
    assert run.cache.location == tmp_path / "run" / "cache"


def test_a_list_of_units_that_is_gone_is_no_empty_one(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path, CONFIG, {})
    assert run.units() == {}
    run.write_units({"selection": [ListedUnit("selection", "f" * 32)]})
    (tmp_path / "units.json").unlink()
    with raises(ValueError, tmp_path / "units.json", "run it again"):
        run.units()


def test_lock_excludes_and_frees(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path, CONFIG, {})
    with run.lock():
        with raises(RunLocked, tmp_path, os.getpid()), run.lock():
            pass
        with pytest.raises(RunLocked), RunDirectory.open(tmp_path).lock():
            pass
    with pytest.raises(KeyError), run.lock():
        raise KeyError("the body's own error passes")
    with run.lock():
        pass


def test_holder_that_has_not_written_its_name_yet(tmp_path: Path) -> None:
    run = RunDirectory.open_or_create(tmp_path, CONFIG, {})
    with run.lock():
        (tmp_path / "run.lock").write_bytes(b"{")
        with raises(RunLocked, tmp_path), run.lock():
            pass


def _create(path: str, number: int) -> str:
    try:
        RunDirectory.open_or_create(path, {"number": number}, {})
    except RunConfigMismatch:
        return "refused"
    return "created"


def test_drivers_that_create_one_run_with_different_configs(tmp_path: Path) -> None:
    """All but one are refused: the file of the first is never replaced."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["storage.run_directory"])
    with context.Pool(4) as pool:
        for attempt in range(5):
            path = str(tmp_path / f"run-{attempt}")
            answers = pool.starmap(_create, [(path, number) for number in range(4)], chunksize=1)
            assert sorted(answers) == ["created", "refused", "refused", "refused"]
