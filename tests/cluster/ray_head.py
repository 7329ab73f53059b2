"""A Ray cluster of one machine as `ray start` makes it: dashboard, token authentication, daemons of its own.

It shares nothing with other clusters of the machine: ports, temporary directory and home are its own.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.session_directory import session_directory

ROOT = Path(__file__).resolve().parents[2]

QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""A dead node is noticed after 3 s, a frozen one after 10 s."""


def free_ports(num: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on at the moment, below those that the system hands out by itself."""
    found: list[int] = []
    while len(found) < num:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


class RayHead:
    """A running head."""

    def __init__(self, directory: Path, *, num_cpus: int = 2, **variables: str) -> None:
        self.directory = directory
        self.token_file = directory / ".ray" / "auth_token"
        self.token_file.parent.mkdir()
        self.token_file.write_text(secrets.token_hex(32))
        self.token_file.chmod(0o600)
        self._num_cpus = num_cpus
        self.port, self.dashboard_port, self._agent_port, self._metrics_port = free_ports(4)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "HOME": str(directory),
            "RAY_TMPDIR": str(directory),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps the loopback address
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # jobs call `python`
            **variables,
        }
        self.start()

    @property
    def address(self) -> str:
        """Of the control service."""
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def more_arguments(self) -> list[str]:
        """Of `ray start`."""
        return []

    def start(self) -> None:
        """Start the head and wait until its dashboard answers."""
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={self.port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}",
            f"--dashboard-agent-listen-port={self._agent_port}", f"--metrics-export-port={self._metrics_port}",
            f"--temp-dir={self.directory / 'ray'}", f"--num-cpus={self._num_cpus}",
            "--object-store-memory=80000000", "--disable-usage-stats", *self.more_arguments(),
        ]  # fmt: skip
        log = self.directory / "ray_start.log"
        with log.open("a") as output:
            self._process = psutil.Popen(
                command, env=self.environment, cwd=self.directory, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + 200
        for port in (self.port, self.dashboard_port, self._agent_port):
            while not _listens(port):
                assert self._process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)

    def daemons(self) -> list[psutil.Process]:
        """Every process of the cluster, workers and jobs too."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return list(self._process.children(recursive=True))
        return []

    def kill(self) -> None:
        """End everything at once, as a machine that loses its power."""
        processes = [self._process, *self.daemons()]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=60)

    def call(self, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        """Run `python -m pipeline` as a user of this cluster."""
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "pipeline", *arguments], cwd=ROOT, env=self.environment,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip


@contextlib.contextmanager
def ray_head(*, num_cpus: int = 2, **variables: str) -> Iterator[RayHead]:
    """A head that is gone in the end, in a folder whose path leaves room for Unix sockets."""
    with session_directory(Path("/tmp")) as directory:
        head = RayHead(directory, num_cpus=num_cpus, **variables)
        try:
            yield head
        finally:
            head.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
