"""A whole run on a cluster that has no node when it starts."""

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.autoscaling_head import IDLE_TIMEOUT_S, autoscaling_head
from tests.pipeline.small_run import ROOT, command, files, small_run
from tests.pipeline.test_run import count, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NODES = {"cpu": {"resources": {"CPU": 1}, "max_workers": 3}}


@pytest.mark.slow
def test_nodes_come_for_a_run_one_is_taken_away_and_all_leave(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with autoscaling_head(NODES) as head:
        arguments = ("--set", f"cluster.address={head.address}", "--set", "workers.num_workers=auto")
        driver = psutil.Popen(
            command("run", str(small_run(tmp_path)), *arguments),
            cwd=ROOT, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        wait_for(run, "trajectories", lambda: driver.poll() is None)
        assert head.raylets() != []
        wait_for(run, "distillation", lambda: driver.poll() is None)
        num_nodes = len(head.raylets())
        head.take_away(head.raylets()[0])
        output = driver.communicate(timeout=200)[0].decode()
        assert driver.returncode == 0, output
        assert num_nodes == 3, "three units could begin at once, two of the calibration and one of the evaluation"
        assert files(run / "checkpoint") == files(finished_run / "run" / "checkpoint")
        for stage in ("trajectories", "activations", "distillation", "evaluation"):
            assert set(count(run, stage).values()) == {1}
        deadline = time.monotonic() + IDLE_TIMEOUT_S + 20
        while head.raylets():
            assert time.monotonic() < deadline
            time.sleep(0.1)
