"""What every test runs under: no network, one thread a process, fixed seeds; set before torch or Ray is imported."""

import atexit
import gc
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.s3_server import S3Server, s3_server

ROOT = Path(__file__).resolve().parent.parent

# Processes that tests start (Ray workers, torch.distributed ranks, the CLI) inherit these.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
)
# The caller's cluster, buckets and credentials are not the tests'.
for name in (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_NAMESPACE",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    *[name for name in os.environ if name.startswith("AWS_")],
    "PYTHONDONTWRITEBYTECODE",  # some 150 processes would each compile the packages
):
    os.environ.pop(name, None)
sys.dont_write_bytecode = False
# What a shell starts in the background ignores Ctrl-C's signal, and so would every process that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Modules are half a million objects that stay: no collection while they come, and none looks through them afterwards.
gc.disable()
atexit.register(gc.unfreeze)

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


MOST_OBJECTS = 100_000
"""Objects that the collector looks through."""
WAITING_FRAC = 0.6
"""Part of all groups, in their order, within which those with Ray begin."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-golden", action="store_true", help="write what the golden run gives now to tests/golden/digests.json"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share something costly run in one process of pytest-xdist, as another would make it once more: those of a
    module its clusters and models, those of several modules a finished run. Groups with Ray, which wait for other processes
    for the most part, are spread among those that compute: were all at work at once, the cores would be idle later."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "cluster"):
            item.add_marker("ray")
        finished = "finished_run" in getattr(item, "fixturenames", ())
        group = "finished_run" if finished else item.path.relative_to(ROOT).as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
        groups.setdefault(group, []).append(item)
    # The largest group comes first, and what waits begins in the first part: nothing long is left for the end.
    names = sorted(groups, key=lambda group: group != "finished_run")
    waiting = [name for name in names if any(item.get_closest_marker("ray") for item in groups[name])]
    computing = [name for name in names if name not in waiting]
    places = {name: WAITING_FRAC * index / len(waiting) for index, name in enumerate(waiting)}
    places |= {name: (index + 0.5) / len(computing) for index, name in enumerate(computing)}
    items[:] = [item for name in sorted(places, key=places.__getitem__) for item in groups[name]]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)  # after the module's own fixtures are gone
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Modules that tests have imported stay as well. Workers and libraries collect everything at the end of each unit and film,
    a third of a second for a million objects."""
    if nextitem is not None and nextitem.path != item.path and len(gc.get_objects()) > MOST_OBJECTS:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers in every test, whatever ran before it. Imports nothing that the test does not."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def digits_model() -> Path:
    """The small HunyuanVideo pipeline that draws moving digits, as a diffusers folder. Read only."""
    path = ROOT / "assets" / "hunyuanvideo-digits"
    assert (path / "model_index.json").is_file(), f"{path} is part of the checkout and is not there"
    return path


@pytest.fixture(scope="module")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with one bucket, for the tests of a module: those of Ray that come later look at what listens."""
    with s3_server(tmp_path_factory.mktemp("s3") / "server.log") as server:
        yield server


@pytest.fixture
def s3(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, named in this process's environment; short of patience."""
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("REELQUANT_STORE_PATIENCE_S", "30")
    return s3_process
