"""A finished run of the small model, made once, and a Hub."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.hub_server import HubServer, hub_server, point_to, use_cache
from tests.pipeline.small_run import call, small_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an undisturbed run (`run.yaml`, `run/`), made once by two workers. Copy it to change it."""
    folder = tmp_path_factory.mktemp("finished")
    done = call("run", str(small_run(folder, workers={"num_workers": 2})))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def hub_process() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture
def hub(hub_process: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """An empty Hub, which this process asks, with an empty cache."""
    hub_process.repositories.clear()
    hub_process.requests.clear()
    point_to(hub_process.endpoint, monkeypatch)
    use_cache(tmp_path / "cache", monkeypatch)
    # Processes of pytest-xdist end without their exit handlers.
    monkeypatch.setattr("pipeline.hub_model.mkdtemp", partial(mkdtemp, dir=tmp_path))
    return hub_process
