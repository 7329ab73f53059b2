"""One Ray session for all tests of a module: a start takes seconds."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.session import Session, SessionSettings, ray_session


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home directory that no test of another module sees."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(path))
        yield path


@pytest.fixture(scope="module")
def strangers() -> list[psutil.Process]:
    """Processes below this one that are not the session's, such as the fork server of tests that ran before."""
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


@pytest.fixture(scope="module")
def session(home: Path, strangers: list[psutil.Process]) -> Iterator[Session]:
    """A local session with two GPUs that exist in Ray's books only. Nothing of it may be left in the end."""
    before, handler = environment(), signal.getsignal(signal.SIGTERM)
    with ray_session(SessionSettings(num_cpus=4, num_gpus=2)) as opened:
        yield opened
        children = [child for child in psutil.Process().children(recursive=True) if child not in strangers]
    assert environment() == before
    assert signal.getsignal(signal.SIGTERM) is handler
    assert opened.directory is not None
    assert not opened.directory.exists()
    assert [child.name() for child in psutil.wait_procs(children, timeout=60)[1]] == []
