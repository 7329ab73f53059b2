"""A model of the Hub: resolved once, recorded, fetched by its hash as far as the loaders read it; and what cannot be."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import close_session, constants
from rich.console import Console

from pipeline.config.loading import ConfigError, load_config
from pipeline.config.schema import RunConfig
from pipeline.context import Run, RunContext, build_context
from pipeline.hub_model import FoundModel, find_model, pinned
from pipeline.plan import fetched, plan_config
from pipeline.planning.machine import cache_problems
from pipeline.planning.plan_result import Plan
from pipeline.planning.plan_tables import show_plan
from pipeline.report.page import render
from pipeline.report.run_data import read_run
from pipeline.runner import open_run
from pipeline.status import show_status
from pipeline.study.expansion import load_study
from pipeline.study.preparation import prepare_study
from pipeline.study.status import show_study_status
from pipeline.submission import job_of
from tests.errors import names, raises
from tests.hub_server import HubServer, Repository, hub_server, point_to, use_cache
from tests.pipeline.small_run import small_run
from tests.recording_server import recording_server
from workers.hub_snapshot import ask_directly, model_folder

MODEL = "maker/digits"
TOKEN = "hf_token_of_the_tests"
EXTRAS = (
    "README.md",
    ".gitattributes",
    "demo.mp4",
    "notes.txt",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "unused/config.json",
    "vae/README.md",
)


@pytest.fixture
def digits(hub: HubServer, digits_model: Path, tmp_path: Path) -> Repository:
    """The small model's repository, with much that no loader reads."""
    folder = Path(shutil.copytree(digits_model, tmp_path / "first"))
    for name in EXTRAS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for a loader")
    repository = hub.repository(MODEL)
    repository.commit(folder)
    return repository


def move(repository: Repository, tmp_path: Path, *, tag: str | None = None) -> str:
    """Moves the branch to another commit, with another scheduler."""
    second = Path(shutil.copytree(tmp_path / "first", tmp_path / f"second{len(repository.commits)}"))
    path = second / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text() + "\n" * len(repository.commits))
    commit = repository.commit(second)
    if tag is not None:
        repository.tags[tag] = commit
    return commit


def config_of(folder: Path, **changes: Any) -> RunConfig:
    return load_config(small_run(folder, **{"model": MODEL, **changes}))


def found(config: RunConfig) -> FoundModel:
    return find_model(pinned(config)[0])


def text_of(show: Any, *arguments: Any) -> str:
    file = io.StringIO()
    show(*arguments, Console(file=file, width=200))
    return file.getvalue()


# Files


def plain(plan: Plan) -> tuple[Any, ...]:
    return plan.stages, plan.checkpoints, plan.counts.layout, plan.problems


def test_a_plan_fetches_what_is_small_and_a_run_the_weights(
    hub: HubServer, digits: Repository, digits_model: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    of_folder = plan_config(config.model_copy(update={"model": digits_model}))
    planned = plan_config(config)
    assert plain(planned) == plain(of_folder)
    read = {p.relative_to(digits_model).as_posix() for p in digits_model.rglob("*") if p.is_file()}
    weights = {name for name in read if name.endswith(".safetensors")}
    assert set(hub.downloads(MODEL)) == read - weights
    [note] = [note for note in planned.notes if note.startswith("model: ")]
    assert names(note, MODEL, constants.HF_HUB_CACHE)
    assert f"Hub, {digits.branches['main']}" in text_of(partial(show_plan, planned))
    hub.requests.clear()
    ready = fetched(planned, Console(quiet=True), update=False)
    assert set(hub.downloads(MODEL)) == weights
    assert not [request for request in hub.requests if request.path.startswith("/api/models")], "the commit is known"
    assert plain(ready) == plain(of_folder)
    assert ready.context.model_fingerprint == of_folder.context.model_fingerprint
    cache = Path(constants.HF_HUB_CACHE)
    assert {
        p.relative_to(ready.context.model.folder).as_posix() for p in ready.context.model.folder.rglob("*.*")
    } == read
    assert ready.context.model.folder.is_relative_to(cache)


def test_a_worker_fetches_by_hash_into_its_own_cache_once(
    hub: HubServer, digits: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = pickle.loads(pickle.dumps(found(config_of(tmp_path)).snapshot))  # noqa: S301 - as Ray sends it
    move(digits, tmp_path)
    use_cache(tmp_path / "cache of the node", monkeypatch)
    hub.requests.clear()
    with ThreadPoolExecutor(4) as workers:
        folders = list(workers.map(lambda _: model_folder(snapshot), range(4)))
    assert set(folders) == {folders[0]}
    assert folders[0].is_relative_to(tmp_path / "cache of the node")
    assert Counter(hub.downloads(MODEL)) == dict.fromkeys(snapshot.files, 1)
    for name in snapshot.files:
        assert (folders[0] / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_a_download_that_breaks_off_goes_on(hub: HubServer, digits: Repository, tmp_path: Path) -> None:
    snapshot = found(config_of(tmp_path)).snapshot
    assert snapshot is not None
    hub.breaks.append("transformer/diffusion_pytorch_model.safetensors")
    hub.requests.clear()
    folder = model_folder(snapshot)
    for name in snapshot.files:
        assert (folder / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    [resumed] = [request.range for request in hub.requests if request.to_storage and request.range is not None]
    assert int(resumed.removeprefix("bytes=").removesuffix("-")) > 0


@pytest.mark.parametrize("tree_is_known", [True, False])
def test_offline_a_cached_commit_is_enough(
    hub: HubServer, digits: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree_is_known: bool
) -> None:
    online = found(config_of(tmp_path))
    assert online.snapshot is not None
    model_folder(online.snapshot)
    if not tree_is_known:  # as older versions of the library leave the cache
        monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
        for path in Path(constants.HF_HUB_CACHE).rglob("trees/*.json"):
            path.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    for revision in (digits.branches["main"], None):
        offline = found(config_of(tmp_path, model_revision=revision))
        assert offline.snapshot == online.snapshot
        assert (offline.missing_bytes, offline.problems) == (0, ())
        assert model_folder(offline.snapshot) == offline.folder
    assert hub.requests == []
    with raises(ConfigError, "HF_HUB_OFFLINE", "v1", digits.branches["main"]):
        found(config_of(tmp_path, model_revision="v1"))
    use_cache(tmp_path / "another", monkeypatch)
    with raises(OSError, "HF_HUB_OFFLINE", MODEL, tmp_path / "another"):
        model_folder(online.snapshot)


def test_a_cached_commit_is_enough_where_the_hub_does_not_answer(
    digits: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    context = build_context(config, weights=False)
    begin(context)
    model_folder(context.source.model)
    with hub_server() as gone:
        pass
    point_to(gone.endpoint, monkeypatch)
    again = found(config)
    assert (again.snapshot, again.missing_bytes) == (context.source.model, 0)


def test_shards_of_a_variant_alone_are_fetched(hub: HubServer, digits: Repository, tmp_path: Path) -> None:
    folder, transformer = tmp_path / "variants", tmp_path / "variants" / "transformer"
    shutil.copytree(tmp_path / "first", folder)
    shards = [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard in shards:
        shutil.copy(transformer / "diffusion_pytorch_model.safetensors", transformer / shard)
    (transformer / "diffusion_pytorch_model.fp16.safetensors").unlink()
    index = transformer / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    digits.commit(folder)
    snapshot = found(config_of(tmp_path, model_variant="fp16")).snapshot
    assert snapshot is not None
    own = {name.removeprefix("transformer/") for name in snapshot.files if name.startswith("transformer/")}
    assert own == {"config.json", index.name, *shards}
    assert "vae/diffusion_pytorch_model.safetensors" in snapshot.files


# Commits


def begin(context: RunContext) -> Run:
    """Leaves the run as a driver does that ends right after its start."""
    return open_run(context, update=False)


def test_a_run_keeps_the_commit_that_it_recorded(
    hub: HubServer, digits: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, first = config_of(tmp_path), digits.branches["main"]
    context = build_context(config, weights=False)
    begin(context)
    assert names(str(context.model_note), MODEL, first, "main")
    second = move(digits, tmp_path, tag="v2")
    resumed = build_context(config, weights=False)
    assert resumed.config.identity() == context.config.identity()
    assert resumed.source == context.source
    assert names(str(resumed.model_note), first, second)
    for told in (text_of(show_status, config.run), render(read_run(config.run))):
        assert f"{MODEL} at commit {first}" in told
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pinned(config)[0].model_commit == first, "the Hub is not needed for it"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    changed = config_of(tmp_path, model_revision="v2")
    assert [p for p in plan_config(changed).problems if names(p, "model_commit", first, second, "model_revision")]
    updated = plan_config(changed, update=True)
    assert updated.problems == []
    assert open_run(updated.context, update=True).directory.config["model_commit"] == second
    assert pinned(changed)[0].model_commit == second


def test_a_study_has_one_commit_in_all_its_runs_later_ones_too(digits: Repository, tmp_path: Path) -> None:
    path, first = tmp_path / "study.yaml", digits.branches["main"]
    base = yaml.safe_load(small_run(tmp_path, model=MODEL).read_text())
    study = {"study": str(tmp_path / "study"), "config": base, "seeds": [0, 1]}
    path.write_text(yaml.safe_dump({**study, "settings": [{"name": "a", "set": {"method": "rtn"}}]}))
    prepared = prepare_study(load_study(path))
    assert prepared.problems == []
    [label, _] = prepared.contexts
    begin(prepared.contexts[label])
    move(digits, tmp_path)
    settings = [{"name": name, "set": {"method": method}} for name, method in (("new", "gptq"), ("a", "rtn"))]
    path.write_text(yaml.safe_dump({**study, "settings": settings}))
    again = prepare_study(load_study(path))
    assert {run.config.model_commit for run in again.study.runs} == {first}
    assert {context.config.model_commit for context in again.contexts.values()} == {first}
    assert {context.source.model for context in again.contexts.values()} == {prepared.contexts[label].source.model}
    assert f"{MODEL} at commit {first}" in text_of(show_study_status, tmp_path / "study")


# What cannot be


def test_a_folder_comes_before_an_id(
    hub: HubServer, digits_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("maker").mkdir()
    Path(MODEL).symlink_to(digits_model)
    planned = plan_config(config_of(tmp_path))
    assert "local folder" in text_of(partial(show_plan, planned))
    assert planned.context.source.model == digits_model
    assert hub.requests == []
    with raises(ConfigError, "model_revision", MODEL):
        pinned(config_of(tmp_path, model_revision="main"))


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "/nowhere/at/all", "../digits"])
def test_neither_a_folder_nor_an_id(model: str, tmp_path: Path) -> None:
    with raises(ConfigError, model):
        found(config_of(tmp_path, model=model))


def gated(repository: Repository) -> None:
    repository.gated = True


def private(repository: Repository) -> None:
    repository.token = TOKEN


@pytest.mark.parametrize(
    ("changes", "set_up", "words"),
    [
        ({"model": "maker/nothing"}, None, ("maker/nothing", "HF_TOKEN")),
        ({"model": "ma--ker/digits"}, None, ("ma--ker/digits", "owner/name")),
        ({"model": "maker/digits.git"}, None, ("maker/digits.git", "owner/name")),
        ({"model_revision": "v7"}, None, ("model_revision", "v7", "main", "v1")),
        ({"model_commit": "0" * 40}, None, ("model_revision", "0" * 40)),
        ({}, gated, (MODEL, "terms", "HF_TOKEN")),
        ({}, private, (MODEL, "HF_TOKEN")),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_give(
    digits: Repository, tmp_path: Path, changes: dict[str, Any], set_up: Any, words: tuple[str, ...]
) -> None:
    digits.tags["v1"] = digits.branches["main"]
    if set_up is not None:
        set_up(digits)
    with raises(ConfigError, *words):
        found(config_of(tmp_path, **changes))


def test_a_hub_that_cannot_be_reached(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server() as gone:
        pass
    point_to(gone.endpoint, monkeypatch)
    with raises(ConfigError, MODEL, gone.endpoint, constants.HF_HUB_CACHE):
        found(config_of(tmp_path))


def test_a_cache_that_cannot_be_written(digits: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    use_cache(tmp_path / "file" / "cache", monkeypatch)
    with raises(ConfigError, MODEL, tmp_path / "file" / "cache", "HF_HUB_CACHE"):
        found(config_of(tmp_path))


def test_a_cache_without_room(digits: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = found(config_of(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40 - 1000, 1000))
    [problem] = cache_problems(model)
    assert names(problem, MODEL, constants.HF_HUB_CACHE, "HF_HUB_CACHE")
    assert cache_problems(FoundModel(tmp_path)) == []


def test_a_repository_that_is_no_pipeline(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"x")
    commit = hub.repository(MODEL).commit(tmp_path / "gguf")
    with raises(ConfigError, MODEL, commit, "model_index.json", "model.gguf"):
        found(config_of(tmp_path))


def test_weights_that_are_not_there(hub: HubServer, digits: Repository, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tmp_path / "first", tmp_path / "pickled"))
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "vae" / "config.json").unlink()
    digits.commit(folder)
    said = plan_config(config_of(tmp_path, model_variant="bf16")).problems
    wanted: list[tuple[object, ...]] = [
        (MODEL, "model_variant", "bf16", "fp16"),
        (f"{MODEL}/text_encoder", "pytorch_model.bin", "save_pretrained"),
        (f"{MODEL}/vae/config.json",),
    ]
    for problem, words in zip(said, wanted, strict=True):
        assert names(problem, "model", *words)


def test_a_job_is_refused_for_a_model_that_is_nowhere(digits: Repository, tmp_path: Path) -> None:
    path = small_run(tmp_path, model=MODEL)
    assert f"model: {MODEL}" in job_of(path, []).entrypoint
    with raises(ConfigError, "model", "maker/nothing", "checkout"):
        job_of(path, ["model=maker/nothing"])


# Tokens


def test_a_token_goes_to_the_hub_alone(
    hub: HubServer, digits: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with recording_server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "elsewhere.example")
        monkeypatch.setenv("NO_PROXY", "elsewhere.example")
        close_session()
        model = found(config_of(tmp_path))
        assert model.snapshot is not None
        model_folder(model.snapshot)
        assert proxy.requests == []
    asked = [request for request in hub.requests if MODEL in request.path]
    assert {request.token for request in asked if not request.to_storage} == {TOKEN}
    stored = [request for request in asked if request.to_storage]
    assert {request.token for request in stored} == {None}
    assert {request.range is None for request in stored} == {True, False}, "whole files, and headers alone"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("endpoint", "token", "excluded"),
    [
        ("http://hub.example:80", TOKEN, True),
        ("http://hub.example", "", False),
        ("http://localhost:1", "", True),
        ("https://hub.example", TOKEN, False),
    ],
)  # fmt: skip
def test_a_proxy_sees_no_token_in_the_clear(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, token: str, excluded: bool
) -> None:
    point_to(endpoint, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "other.example")
    monkeypatch.setenv("NO_PROXY", "other.example")
    ask_directly()
    hosts = os.environ["NO_PROXY"].split(",")
    assert ("hub.example" in hosts or "localhost" in hosts) is excluded
    assert "other.example" in hosts
