"""Proxies of the environment see neither the cluster's token nor requests for this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.job_submission import JobClient
from cluster.proxies import loopback_excluded
from tests.errors import raises
from tests.recording_server import RecordingServer, recording_server

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "7d" * 32


@pytest.fixture
def proxy() -> Iterator[RecordingServer]:
    with recording_server() as server:
        yield server


@pytest.fixture
def asked() -> Iterator[RecordingServer]:
    with recording_server() as server:
        yield server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize(
    "settings", [("http_proxy",), ("HTTP_PROXY", "no_proxy=.example.com"), ("ALL_PROXY", "NO_PROXY=10.0.0.0/8")]
)
def test_a_client_of_the_dashboard_asks_it_directly(
    proxy: RecordingServer,
    asked: RecordingServer,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    settings: tuple[str, ...],
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    variable, *exceptions = settings
    monkeypatch.setenv(variable, proxy.url)
    for exception in exceptions:
        monkeypatch.setenv(*exception.split("="))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    before = dict(os.environ)
    with raises(ConnectionError, 503):
        JobClient(asked.url.replace("127.0.0.1", host))
    assert proxy.requests == []
    assert asked.requests
    assert all(TOKEN in request for request in asked.requests), "the token goes to whom it belongs"
    assert dict(os.environ) == before


@pytest.mark.parametrize("command", ["submit", "logs", "stop", "status"])
def test_commands_ask_no_proxy_for_this_machine(
    proxy: RecordingServer, asked: RecordingServer, tmp_path: Path, command: str
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    (tmp_path / "run.yaml").write_text(
        f"run: {tmp_path}/run\nmodel: /nowhere\nprompts: {{calibration: /c.txt, held_out: /h.txt}}\n"
    )
    arguments = {"submit": [str(tmp_path / "run.yaml")], "status": ["s3://bucket/somewhere/run"]}.get(command, ["job"])
    if command != "status":
        arguments += ["--address", asked.url]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", command, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={
            **clean, "http_proxy": proxy.url, "RAY_AUTH_TOKEN": TOKEN, "AWS_ENDPOINT_URL": asked.url,
            "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "REELQUANT_STORE_PATIENCE_S": "0.1",
        },
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert proxy.requests == []
    assert asked.requests
    assert TOKEN not in done.stdout + done.stderr


def test_exceptions_of_the_environment_stay() -> None:
    loopback = "localhost,127.0.0.1,127.0.0.0/8,::1"
    assert set(loopback_excluded({}).values()) == {loopback}
    assert loopback_excluded({"no_proxy": "a, .b"}) == dict.fromkeys(("no_proxy", "NO_PROXY"), f"a,.b,{loopback}")
    both = loopback_excluded({"no_proxy": "*", "NO_PROXY": "::1"})
    assert both == {"no_proxy": "*", "NO_PROXY": "::1,localhost,127.0.0.1,127.0.0.0/8"}
    assert loopback_excluded(both) == both
