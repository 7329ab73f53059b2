"""Calls the pipeline as a user does, in processes of its own, and gives a run its calibration data a second time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import ROOT

STOP_S = 60.0
"""So long a driver may take to end its workers when it is stopped."""


class Failed(RuntimeError):
    """A command ended with an error, which it has printed."""


class OutOfTime(RuntimeError):
    """The command was stopped, as the time was up."""


def call(*arguments: str | Path, deadline: float | None = None, gpus: str | None = None) -> float:
    """Runs `python -m` with the arguments at the checkout's root, its output shown; returns seconds.

    Args:
        deadline: on `time.monotonic`, when it is stopped as by Ctrl-C.
        gpus: those that it sees, as in `CUDA_VISIBLE_DEVICES`; default: as this process.

    Raises:
        Failed: it ended with an error.
        OutOfTime: it was stopped.
    """
    shown = " ".join(argument.name if isinstance(argument, Path) else argument for argument in arguments)
    began = time.monotonic()
    if deadline is not None and began >= deadline:
        raise OutOfTime(f"the time was up before: {shown}")
    print(f"+ python -m {shown}", flush=True)
    # In this process's group: whatever ends this one ends the driver, and that its workers.
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if gpus is not None:
        environ["CUDA_VISIBLE_DEVICES"] = gpus
    process = subprocess.Popen([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=environ)
    try:
        code = process.wait(None if deadline is None else deadline - began)
    except subprocess.TimeoutExpired as error:
        process.send_signal(signal.SIGINT)
        _end(process)
        raise OutOfTime(f"the time was up after {time.monotonic() - began:.0f} s of: {shown}") from error
    except KeyboardInterrupt:  # it has had its own
        _end(process)
        raise
    if code != 0:
        raise Failed(f"exit code {code} of: {shown}")
    return time.monotonic() - began


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def branch_run(run: Path, target: Path) -> None:
    """The run as it is now, at another place, with the same calibration data: its files are linked, and nobody writes into
    one that is there. Its log and its lock stay behind."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in ("config.json", "units.json"):
        shutil.copyfile(run / name, partial / name)
    shutil.copytree(run / "cache", partial / "cache", copy_function=os.link)
    partial.rename(target)
