"""Ray's cluster launcher for real: `ray up`, a run with `ray exec`, `ray down`, over SSH to this machine.

The SSH server runs in a process namespace of its own: `ray stop` ends every Ray process that it can see, and there it sees
only those of this test. Ports and home directories are the test's own too; nothing is installed, the nodes use this
environment.
"""

import getpass
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.session_directory import session_directory
from tests.cluster.ray_head import ROOT, free_ports
from tests.pipeline.small_run import files, small_run

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

SSHD_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {base}/host_key
AuthorizedKeysFile {base}/user_key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
SetEnv HOME={base}/node RAY_TMPDIR={base} RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"""


def reason_to_skip() -> str:
    missing = [name for name in ("ssh", "ssh-keygen", "rsync", "nc", "unshare") if shutil.which(name) is None]
    missing += [] if Path(SSHD).is_file() else ["sshd"]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: openssh-server, rsync, netcat-openbsd, util-linux)"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-pf", "--mount-proc", "true"], check=False).returncode != 0:
        return "a process namespace takes root"
    if not (Path(sys.prefix) / "bin" / "ray").is_file():
        return f"{sys.prefix} has no bin/ray"
    return ""


class Launcher:
    """The machine that `ray up` is called on, and the node it logs in to."""

    def __init__(self, base: Path) -> None:
        self.base = base
        for name in ("home/.ray", "node"):
            (base / name).mkdir(parents=True)
        (base / "node" / "reelquant-env").symlink_to(sys.prefix)
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(base / key)], check=True)
        self._ssh_port, self._gcs_port, self._dashboard_port, self._agent_port = free_ports(4)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "HOME": str(base / "home"),
            "RAY_TMPDIR": str(base),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.config = base / "cluster.yaml"
        self.config.write_text(yaml.safe_dump(self._derived(), sort_keys=False))
        self.ray("get-auth-token", "--generate")
        (base / "home" / ".ray" / "auth_token").chmod(0o600)

    def _derived(self) -> dict[str, Any]:
        """configs/clusters/onprem.yaml with this machine's addresses; the environment is here already."""
        config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "clusters" / "onprem.yaml").read_text())
        config["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
        config["auth"] = {
            "ssh_user": getpass.getuser(),
            "ssh_private_key": str(self.base / "user_key"),
            "ssh_proxy_command": f"nc 127.0.0.1 {self._ssh_port}",
        }
        config["setup_commands"] = [command for command in config["setup_commands"] if "pip install" not in command]
        options = (
            f"ray start --head --node-ip-address=127.0.0.1 --num-cpus=2 --object-store-memory=80000000 "
            f"--dashboard-port={self._dashboard_port} --dashboard-agent-listen-port={self._agent_port} "
        )
        config["head_start_ray_commands"] = [
            command.replace("--port=6379", f"--port={self._gcs_port}").replace("ray start --head ", options)
            for command in config["head_start_ray_commands"]
        ]
        return config

    def serve(self) -> psutil.Popen:
        """The SSH server; every process that is started through it ends with it."""
        Path("/run/sshd").mkdir(exist_ok=True)
        path = self.base / "sshd_config"
        path.write_text(SSHD_CONFIG.format(port=self._ssh_port, base=self.base))
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", SSHD, "-D", "-e", "-f", str(path)]
        log = (self.base / "sshd.log").open("wb")
        server = psutil.Popen(command, stdout=log, stderr=log)
        log.close()
        return server

    def ray(self, *arguments: str, timeout: float = 300) -> str:
        """Calls Ray's command line; returns what it says."""
        done = subprocess.run(
            [str(Path(sys.prefix) / "bin" / "ray"), *arguments], cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)

    def daemons(self) -> list[str]:
        """Names of Ray's daemons of this cluster."""
        marks = (str(self.base), "raylet", "gcs_server")
        lines = [(p.info["name"], " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["name", "cmdline"])]
        return [name for name, line in lines if name in marks[1:] and marks[0] in line]


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    with session_directory(Path("/tmp")) as base:
        prepared = Launcher(base)
        server = prepared.serve()
        try:
            yield prepared
        finally:
            server.kill()
            server.wait(20)


def test_a_run_on_a_cluster_that_ray_up_made(launcher: Launcher, finished_run: Path, tmp_path: Path) -> None:
    config = small_run(tmp_path)
    up = launcher.ray("up", "-y", "--no-config-cache", str(launcher.config))
    assert "Useful commands" in up
    assert sorted(set(launcher.daemons())) == ["gcs_server", "raylet"]
    token = launcher.base / "node" / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    said = launcher.ray(
        "exec", str(launcher.config),
        f"cd ~/reelquant && RAY_AUTH_MODE=token python -m pipeline run {config} --set cluster.address=auto",
    )  # fmt: skip
    assert "units done now, 0 were done before" in said
    assert files(tmp_path / "run" / "checkpoint") == files(finished_run / "run" / "checkpoint")
    launcher.ray("down", "-y", str(launcher.config))
    deadline = time.monotonic() + 30
    while launcher.daemons() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert launcher.daemons() == []
