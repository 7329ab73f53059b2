"""`submit`, `logs`, `stop` on a real cluster with token authentication, and what is refused before anything is sent."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.job_submission import JobClient, JobRequest, new_submission_id
from cluster.session_directory import session_directory
from pipeline.cli import app
from pipeline.config.loading import ConfigError
from pipeline.event_log import read_events
from pipeline.submission import job_of
from storage.open_place import open_place
from tests.cluster.ray_head import RayHead, free_ports, ray_head
from tests.errors import names, raises
from tests.pipeline.small_run import ROOT, command, files, small_run
from tests.recording_server import recording_server
from tests.s3_server import S3Server, new_prefix

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """Started as by `.venv/bin/ray start`, with nothing of the environment on its PATH; a proxy is in the environment."""
    with recording_server() as proxy, ray_head(PATH="/usr/bin:/bin", http_proxy=proxy.url) as running:
        yield running
        # Ray's own daemons, which inherit it, look for each other and for the metadata of clouds through it.
        token, dashboard = running.token_file.read_text(), f":{running.dashboard_port}"
        assert [r for r in proxy.requests if token in r or dashboard in r.splitlines()[0]] == []


@pytest.fixture
def client(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> JobClient:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_file))
    monkeypatch.setenv("http_proxy", head.environment["http_proxy"])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # Ray's own client would take it
    return JobClient(head.dashboard)


def submission_id(output: str) -> str:
    found = re.search(r"^job: +(\S+)$", output, re.MULTILINE)
    assert found is not None, output
    return found[1]


def wait_for(run: Path, event: str, stage: str) -> None:
    deadline = time.monotonic() + 120
    while not any(e["event"] == event and e["stage"] == stage for e in read_events(run) if "unit" in e):
        assert time.monotonic() < deadline, f"no {event} in {stage}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_job_left_alone_then_stopped_then_submitted_again_gives_the_same_bytes(
    head: RayHead, finished_run: Path, tmp_path: Path
) -> None:
    config, run = str(small_run(tmp_path)), tmp_path / "run"
    follower = subprocess.Popen(
        command("submit", config, "--address", head.dashboard), cwd=ROOT, env=head.environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(run, "unit_finished", "trajectories")
    follower.send_signal(signal.SIGINT)
    output, _ = follower.communicate(timeout=120)
    assert follower.returncode == 130, output
    job = submission_id(output)
    assert f"python -m pipeline logs {job} --address {head.dashboard}" in output
    assert f"python -m pipeline stop {job} --address {head.dashboard}" in output
    wait_for(run, "unit_started", "distillation")  # it went on without us
    stopped = head.call("stop", job, "--address", head.dashboard)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert f"stopped: {job}" in stopped.stdout
    shown = head.call("logs", job, "--address", head.dashboard)
    assert shown.returncode == 143, "a stopped job is no success"
    assert shown.stdout.count("Trajectories: 2/2") == 1
    assert "SIGTERM received" not in shown.stdout, "no dump of Ray's core"
    assert not any(event["event"] == "run_finished" for event in read_events(run))
    again = head.call("submit", config, "--address", head.dashboard)
    assert (again.returncode, again.stderr) == (0, ""), again.stdout
    assert submission_id(again.stdout) != job
    assert re.search(r"^Evaluation: (\d+)/\1 ", again.stdout, re.MULTILINE)
    assert re.search(r"(\d+) units done now, [1-9]\d* were done before", again.stdout)
    assert f"succeeded: {submission_id(again.stdout)}" in again.stdout
    assert files(run / "checkpoint") == files(finished_run / "run" / "checkpoint")


@pytest.mark.slow
def test_a_study_in_a_bucket_as_a_job_then_once_more(s3: S3Server, tmp_path: Path) -> None:
    """Its files here, its runs in the bucket: the cluster sees nothing else."""
    path = study_file(tmp_path, study=(place := new_prefix("study")), seeds=[0])
    environment: dict[str, Any] = s3.environment
    with ray_head(**environment) as head:
        arguments = ("submit", str(path), "--address", head.dashboard, "--until")
        first = head.call(*arguments, "activations")
        assert (first.returncode, first.stderr) == (0, ""), first.stdout
        assert re.search(
            r"^6 units done now, 3 shared with other runs, 0 were done before$", first.stdout, re.MULTILINE
        )
        again = head.call(*arguments, "distillation")
        assert (again.returncode, again.stderr) == (0, ""), again.stdout
        assert re.search(r"^[1-9]\d* units done now, 0 shared with other runs, 9 were done", again.stdout, re.MULTILINE)
    assert open_place(place).read("study.json")
    shown = CliRunner().invoke(app, ["status", place]).output
    assert re.search(r"^seed-0/naive .* assembly 1, evaluation 4$", shown, re.MULTILINE), shown


def test_a_job_that_fails_gives_its_exit_code_and_its_words(head: RayHead, tmp_path: Path) -> None:
    arguments = (str(small_run(tmp_path)), "--address", head.dashboard, "--set", "model=/nowhere/at/all")
    failed = head.call("submit", *arguments)
    assert failed.returncode == 1
    assert names(failed.stdout, "model", "/nowhere/at/all")
    assert "failed: " in failed.stdout
    assert not (tmp_path / "run").exists()


def test_exit_codes_of_drivers(client: JobClient, tmp_path: Path) -> None:
    entrypoints = {3: "exit 3", 137: "kill -9 $$", 0: "true"}
    requests = {
        code: JobRequest(new_submission_id("exit codes"), f"echo {code} comes; {entrypoint}", tmp_path)
        for code, entrypoint in entrypoints.items()
    }
    for request in requests.values():
        client.submit(request)
    for code, request in requests.items():
        output: list[str] = []
        end = client.follow(request.submission_id, output.append)
        assert (end.exit_code, end.status) == (code, "FAILED" if code else "SUCCEEDED")
        assert f"{code} comes\n" in "".join(output)
        assert client.stop(request.submission_id) == end, "an ended job is left as it is"


def test_a_job_has_the_time_to_stop_that_it_needs(client: JobClient, tmp_path: Path) -> None:
    program = "trap 'sleep 5; touch clean; exit 7' TERM; touch ready; while true; do sleep 0.1; done"
    request = JobRequest(new_submission_id("slow stop"), f"cd {tmp_path}; {program}", tmp_path / "empty")
    request.working_dir.mkdir()
    client.submit(request)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert client.stop(request.submission_id).exit_code == 143
    assert (tmp_path / "clean").exists(), "Ray alone would have killed it after 3 s"


def test_jobs_that_are_not_there(client: JobClient) -> None:
    with raises(ValueError, "nothing"):
        client.stop("nothing")
    with raises(ValueError, "nothing"):
        client.follow("nothing", lambda text: None)


def test_a_wrong_token_is_refused(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with raises(ConnectionError, head.dashboard, "RAY_AUTH_TOKEN_PATH"):
        JobClient(head.dashboard)


def test_no_authentication_where_a_token_is_wanted(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with raises(ConnectionError, head.dashboard, "token"):
        JobClient(head.dashboard)


def test_no_token_at_all(head: RayHead, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with raises(ConnectionError, tmp_path):
        JobClient(head.dashboard)


def test_addresses_where_no_dashboard_is() -> None:
    [port] = free_ports(1)
    with raises(ConnectionError, f"http://127.0.0.1:{port}"):
        JobClient(f"http://127.0.0.1:{port}")
    for address in ("127.0.0.1:8265", "ray://127.0.0.1:10001", "auto"):
        with raises(ValueError, address, "http://127.0.0.1:8265"):
            JobClient(address)


def problems_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        job_of(path, overrides)
    return str(caught.value)


def test_what_a_job_could_not_do_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    path = small_run(tmp_path)
    text = problems_of(
        path, "run=runs/demo", "cache=runs/units", "cluster.address=local", "workers.num_workers=0", "model=models/nowhere",
        "prompts.held_out=../h.txt", "prompts.num_calibration=500",
        "prompts.calibration=configs/prompts/digits_calibration.txt", "evaluation.recognizer=tests/pipeline",
    ).splitlines()  # fmt: skip
    for key, value in (
        ("run", "runs/demo"), ("cache", "runs/units"),
        ("cluster.address", "'local'"), ("workers.num_workers", "0"), ("model", "models/nowhere"),
        ("prompts.held_out", "../h.txt"), ("evaluation.recognizer", "tests/pipeline"), ("prompts.num_calibration", "500"),
    ):  # fmt: skip
        assert [line for line in text if key in line and value in line], (key, text)
    assert names(problems_of(path, "bits.weight=1"), "bits.weight", 1)
    ignored = ROOT / "assets" / "__pycache__"
    ignored.mkdir(exist_ok=True)
    assert names(problems_of(path, "model=assets/__pycache__"), "model", "assets/__pycache__", ".gitignore")


def test_the_command_carries_the_configuration(tmp_path: Path) -> None:
    request = job_of(small_run(tmp_path), ["seed=7", "cluster.address=auto"], update=True)
    first, *lines = request.entrypoint.splitlines()
    assert first == "sh cluster/job_python.sh $PPID run /dev/stdin --update <<'END_OF_CONFIG'"
    assert "seed: 7" in lines
    assert not any(line.startswith("cluster") for line in lines), "a job finds its own cluster"
    assert request.metadata["run"] == str(tmp_path / "run")
    assert re.fullmatch(r"reelquant-run-\d{8}-\d{6}-[0-9a-f]{4}", request.submission_id)


def study_file(folder: Path, **changes: Any) -> Path:
    base = yaml.safe_load(small_run(folder).read_text()) | {"cluster": {"address": "auto"}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path = folder / "study.yaml"
    settings = [{"name": "naive", "set": {"method": "rtn"}}, {"name": "gptq <x> ' $HOME", "set": {"method": "gptq"}}]
    study = {"study": str(folder / "study"), "config": str(folder / "base.yaml"), "seeds": [0, 1], "settings": settings}
    path.write_text(yaml.safe_dump(study | changes))
    return path


def test_the_command_of_a_study_does_the_same_study_wherever_its_files_lie(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    request = job_of(path, ["selection.num_samples=2", "bits={weight: 5, activation: 6}"], until="activations")
    assert request.metadata["study"] == str(tmp_path / "study")
    for file in (path, tmp_path / "base.yaml"):
        file.unlink()
    command = request.entrypoint.replace("study /dev/stdin", "study /dev/stdin --plan", 1)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4: 2 settings x 2 seeds" in done.stdout
    assert re.search(r"Activations +4 +4 ", done.stdout), "two samples in each of the two runs that need any"
    assert "Distillation" not in done.stdout
    assert "address" not in request.entrypoint, "a job finds its own cluster"


def test_what_the_job_of_a_study_could_not_do_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    path = study_file(tmp_path, study="runs/study", set={"model": "models/nowhere"})
    place, model = problems_of(path).splitlines()
    assert names(place, "study", "runs/study", "/mnt/runs/study")
    assert names(model, "model", "models/nowhere")
    assert names(problems_of(study_file(tmp_path), "cache=runs/units"), "cache", "runs/units", "/mnt/runs/units")
    wrong = study_file(tmp_path, settings=[{"name": "naive", "set": {"method": "x"}}])
    assert names(problems_of(wrong), "setting 'naive'", "method")


def test_mistakes_on_the_command_line_end_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    config = str(small_run(tmp_path))
    assert CliRunner().invoke(app, ["submit", config]).exit_code == 2, "an address is needed"
    for arguments in (["submit", config], ["logs", "job"], ["stop", "job"]):
        result = CliRunner().invoke(app, [*arguments, "--address", "localhost:8265"])
        assert result.exit_code == 1
        assert names(result.output, "error:", "'localhost:8265'")
    assert os.environ.get("RAY_AUTH_MODE") is None


def job_python(process: int, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "cluster/job_python.sh", str(process), *arguments],
        cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_job_takes_the_python_that_has_the_application() -> None:
    with_ray = subprocess.Popen(
        [sys.executable, "-c", "import ray; print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert with_ray.stdout is not None
        with_ray.stdout.readline()
        own = job_python(with_ray.pid, "--help", path="/usr/bin:/bin")
        assert (own.returncode, "Usage" in own.stdout) == (0, True), own.stdout + own.stderr
    finally:
        with_ray.communicate()
    found = job_python(0, "--help", path=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    assert "Usage" in found.stdout
    none = job_python(0, "--help", path="/usr/bin:/bin")
    assert none.returncode == 1
    assert "reelquant[application]" in none.stdout.splitlines()[0]


class HeadWithoutAgent(RayHead):
    """Its agent's port is taken by another program, as by a second cluster of the machine."""

    def more_arguments(self) -> list[str]:
        self.other = socket.create_server(("127.0.0.1", self._agent_port))
        return []


@pytest.mark.slow
def test_an_agent_that_does_not_come_is_waited_for_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.job_submission._AGENT_PATIENCE_S", 1.0)
    with session_directory(Path("/tmp")) as directory:
        head = HeadWithoutAgent(directory)
        try:
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_file))
            client = JobClient(head.dashboard)
            with raises(ConnectionError, "dashboard-agent-listen-port"):
                client.submit(JobRequest(new_submission_id("no agent"), "true", tmp_path))
        finally:
            head.kill()
            head.other.close()
