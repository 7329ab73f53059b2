import contextlib
import http.client
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from cluster import session_directory
from cluster.actor_pool import Unit, run_units
from cluster.session import PROJECT_ROOT, Session, SessionSettings, active_session, ray_session
from tests.cluster.sample_workers import SampleWorker, Settings
from tests.errors import raises

CONNECT = """
import sys
from pathlib import Path
from cluster.actor_pool import Unit, run_units
from cluster.session import SessionSettings, ray_session

address, working_dir = sys.argv[1:]
settings = SessionSettings(address=address, working_dir=Path(working_dir), env_vars={"COLOUR": "green"})
with ray_session(settings) as session:
    import sent_worker
    assert not session.local
    units = [Unit("one", 1)]
    sys.stdout.write(repr(run_units(sent_worker.SentWorker, 40, units, num_workers=2, stall_timeout_s=30)))
"""

SENT_WORKER = """
import os
import cluster

class SentWorker:
    def __init__(self, settings):
        self.settings = settings

    def run(self, unit, progress):
        return self.settings + unit, os.environ["COLOUR"]
"""

ENDLESS_DRIVER = """
import sys
from pathlib import Path
from cluster.actor_pool import Unit, run_units
from cluster.session import SessionSettings, ray_session
from tests.cluster.sample_workers import SampleWorker, Settings

with ray_session(SessionSettings(num_cpus=1, base_directory=Path(sys.argv[1]))):
    units = [Unit("endless", ("wait", "endless"))]
    run_units(SampleWorker, Settings(Path(sys.argv[2])), units, num_workers=1, stall_timeout_s=60)
"""


JOB_AGENT_PORT = 52365
"""Ray's fixed port of job submission on every node."""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for Unix sockets."""
    with session_directory.session_directory(Path("/tmp")) as path:
        yield path


def driver(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Another driver, with none of this process's settings of Ray."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(PROJECT_ROOT), **variables}
    command = [sys.executable, "-W", "error", "-c", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def listeners() -> set[tuple[str, int]]:
    """Address and port of every listener of this process and those below it."""
    found = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {tuple(c.laddr) for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    return found


def test_the_token_is_this_users_alone(session: Session, home: Path) -> None:
    assert session.token_file is not None
    assert session.directory is not None
    assert stat.S_IMODE(session.token_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(session.directory.stat().st_mode) == 0o700
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not (home / ".ray").exists(), "the token in the home directory is another cluster's business"


def answer_without_token(port: int) -> tuple[int, bytes] | None:
    """Status and body of the answer to a job's submission; None from a port that does not speak HTTP/1."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        try:
            connection.request("POST", "/api/job_agent/jobs/", b"{}")
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (http.client.HTTPException, OSError):
            return None


def is_taken_by_others(port: int, ours: set[tuple[str, int]]) -> bool:
    """Whether another Ray session on this machine has the port: then ours goes without job submission."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0 and all(port != own for _, own in ours)


def test_every_listener_is_on_loopback_and_wants_the_token(session: Session) -> None:
    answers: list[tuple[int, bytes]] = []
    refusals, wanted, deadline = 0, 2, time.monotonic() + 200  # Ray's agents begin to listen after the session is open
    while refusals < wanted and time.monotonic() < deadline:
        found = listeners()
        assert {host.removeprefix("::ffff:") for host, _ in found} == {"127.0.0.1"}
        answers = [answer for _, port in found if (answer := answer_without_token(port)) is not None]
        refusals = [status for status, _ in answers].count(401)
        wanted = 1 if is_taken_by_others(JOB_AGENT_PORT, found) else 2
    assert refusals >= wanted, "job submission and runtime environments"
    for status, body in answers:
        assert status in (401, 405) or body.startswith(b"# HELP"), "open to all are only the figures for Prometheus"


def test_a_driver_without_the_token_is_refused(session: Session, tmp_path: Path) -> None:
    other = driver(CONNECT, session.address, str(tmp_path), RAY_AUTH_TOKEN="0" * 64, RAY_NUM_REDIS_GET_RETRIES="2")
    _, stderr = other.communicate(timeout=200)
    assert other.returncode == 1
    assert "InvalidAuthToken" in stderr
    assert "ConnectionError: Failed to connect" in stderr


def test_the_dashboard_is_not_started(session: Session) -> None:
    assert ray.get_runtime_context().gcs_address == session.address
    for port in (8265, 8266):
        assert ("127.0.0.1", port) not in listeners()
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert all("--disable-frontend" in command for command in commands if "dashboard.py" in command)


def test_an_idle_session_is_small(session: Session, strangers: list[psutil.Process]) -> None:
    children = [child for child in psutil.Process().children(recursive=True) if child not in strangers]
    assert not [child for child in children if child.name() == "ray::IDLE"], "no workers ahead of need"
    memory_mb = sum(child.memory_full_info().pss for child in children) / 2**20
    assert memory_mb < 600, f"{memory_mb:.0f} MB for Ray's {len(children)} daemons; 375 MB with Ray 2.60"


def test_a_driver_elsewhere_sends_its_code_and_environment(session: Session, tmp_path: Path) -> None:
    (tmp_path / "sent_worker.py").write_text(SENT_WORKER)
    other = driver(
        CONNECT,
        session.address,
        str(tmp_path),
        PYTHONPATH=f"{PROJECT_ROOT}{os.pathsep}{tmp_path}",
        RAY_AUTH_TOKEN_PATH=str(session.token_file),
    )
    stdout, stderr = other.communicate(timeout=200)
    assert (stdout, stderr) == ("{'one': (41, 'green')}", "")


def test_one_session_at_a_time(session: Session) -> None:
    assert active_session() is session
    with raises(RuntimeError, "session"), ray_session(SessionSettings()):
        pass


def test_workers_import_from_the_checkout(session: Session, tmp_path: Path) -> None:
    units = [Unit("look", ("environment",))]
    [environment] = run_units(SampleWorker, Settings(tmp_path), units, num_workers=1, stall_timeout_s=30).values()
    assert str(PROJECT_ROOT) in environment["PYTHONPATH"].split(os.pathsep)
    assert environment["RAY_AUTH_MODE"] == "token"


def test_a_killed_driver_leaves_no_processes(tmp_path: Path, short_path: Path) -> None:
    with driver(ENDLESS_DRIVER, str(short_path), str(tmp_path)) as other:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("endless.*")):
            assert other.poll() is None, other.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(other.pid).children(recursive=True)
        names = {child.pid: child.name() for child in children}
        assert any(name.startswith("ray::Unit") for name in names.values())
        [left] = short_path.glob("rq-*")
        assert session_directory.sweep_ownerless(short_path) == [], "it has an owner"
        other.send_signal(signal.SIGKILL)
    # These two wait a minute for a control service that is gone, and do nothing.
    agents = [child for child in children if names[child.pid] in ("ray::RuntimeEnvAgent", "ray::DashboardAgent")]
    _, alive = psutil.wait_procs([child for child in children if child not in agents], timeout=60)
    assert [names[child.pid] for child in alive] == []
    for agent in agents:
        agent.kill()
    assert session_directory.sweep_ownerless(short_path) == [left]
    assert not left.exists()


class TestWithoutRay:
    """Refusals that come before anything is started."""

    @pytest.fixture(autouse=True)
    def no_session(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("cluster.session._active", None)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
        monkeypatch.setattr("ray.shutdown", lambda: None)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)

    def test_no_session_is_open(self) -> None:
        with raises(RuntimeError, "ray_session"):
            active_session()

    def test_an_existing_cluster_has_its_own_resources(self) -> None:
        settings = SessionSettings(address="auto", num_cpus=2, num_gpus=1)
        with raises(ValueError, "num_cpus=2", "num_gpus=1"), ray_session(settings):
            pass

    def test_an_object_store_too_small(self) -> None:
        with (
            raises(ValueError, "object_store_bytes", 1000),
            ray_session(SessionSettings(address="local", object_store_bytes=1000)),
        ):
            pass

    def test_a_base_directory_too_long_for_sockets(self, tmp_path: Path) -> None:
        settings = SessionSettings(address="local", base_directory=tmp_path / ("x" * 60))
        with raises(ValueError, tmp_path / ("x" * 60), "base_directory", "RAY_TMPDIR"), ray_session(settings):
            pass
        assert not list(tmp_path.iterdir())

    def test_nobody_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cluster.slow_start.HEAD_PATIENCE_S", 0.1)
        with (
            raises(ConnectionError, "127.0.0.1:9"),
            ray_session(SessionSettings(address="127.0.0.1:9")),
        ):
            pass

    def test_no_token_for_a_cluster(self, tmp_path: Path) -> None:
        with (
            raises(ConnectionError, tmp_path / ".ray" / "auth_token", "RAY_AUTH_TOKEN_PATH"),
            ray_session(SessionSettings(address="auto")),
        ):
            pass

    def test_a_token_that_others_can_read_is_closed_to_them(self, tmp_path: Path) -> None:
        path = tmp_path / "auth_token"
        path.write_text("0" * 64)
        path.chmod(0o644)
        session_directory.restrict_token(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    @pytest.mark.parametrize(
        ("num_cpus", "num_gpus", "expected"), [(1, 0, 8), (2, 1, 2), (0.5, 0.5, 4), (0, 0.3, 6), (0, 2, 1), (3, 3, 0)]
    )
    def test_capacity(self, num_cpus: float, num_gpus: float, expected: int) -> None:
        session = Session("127.0.0.1:1", local=True, num_cpus=8, num_gpus=2, directory=None, token_file=None)
        assert session.capacity(num_cpus=num_cpus, num_gpus=num_gpus) == expected
