"""A unit that runs out of memory, for real: what is said, what is done with less, and that it is the same.

Every test runs in processes of its own. Their `malloc` takes all that is large from the system and gives it back at once, so
that a limit of a process means what it says.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.actor_pool import PoolEvents, Unit, UnitsFailed, run_units
from cluster.session import SessionSettings, ray_session
from tests.errors import names
from tests.workers.limited_memory import BLOCKS, make_run, shared_unit
from tests.workers.memory_limit import LIMITS
from workers.messages import UnitOutput
from workers.out_of_memory import is_out_of_memory
from workers.shared_worker import SharedWorker

ROOT = Path(__file__).resolve().parents[2]
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Environment of the tests on a CPU."""
ON_GPU = {"OMP_NUM_THREADS": "1"}
TIGHT, HOPELESS = 106, 30
"""MiB. In a new process on a CPU the first block takes 126 to 130 MiB as usual, 90 to 95 with what is saved for the backward
pass elsewhere; less in one that has done the like before."""
PROGRAM = """
import json, os, sys
from pathlib import Path
from tests.workers.limited_memory import BLOCKS, make_run, shared_unit
from tests.workers.memory_limit import LIMITS
from workers.out_of_memory import OutOfMemory
from workers.shared_worker import SharedWorker

folder, model, tight, hopeless = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
settings, cache = make_run(folder, model)

def do(worker, name, block):
    try:
        output = worker.run(shared_unit(settings, cache, name, block), lambda *_: None)
    except OutOfMemory as error:
        return {"error": str(error)}
    [file] = output.outputs
    blocks = [found["losses"] for found in output.result["blocks"].values()]
    [attempt] = (folder / "run").glob(f"cache/*/*/{output.attempt}")
    return {"lean": output.lean, "losses": blocks, "data": (attempt / file.path).read_bytes().hex()}

usual = SharedWorker(None)
told = {"usual": [do(usual, "a", block) for block in BLOCKS]}
os.environ[LIMITS] = json.dumps({"a": tight, "b": hopeless})
worker = SharedWorker(None)
told["refused"] = do(worker, "a", BLOCKS[0])
worker.save_memory()
told["saved"] = [do(worker, "a", block) for block in BLOCKS]
told["hopeless"] = do(worker, "b", BLOCKS[0])
told["after"] = do(worker, "c", BLOCKS[0])
print(json.dumps(told))
"""


def told_by(program: str, *arguments: str, environment: dict[str, str]) -> Any:
    """What a process of its own prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {"stderr": done.stderr, **json.loads(done.stdout)}


def check(told: Any, device: str) -> None:
    assert told["stderr"].count("save memory in this process from now on") == 1, "said once"
    ways_out = ("distillation.segment_length", "generation.height")
    assert names(told["refused"]["error"], "distillation/a", device, "asked for", "free", "700.0 MiB", *ways_out)
    assert [found.pop("lean") for found in told["usual"]] == [False, False]
    assert [found.pop("lean") for found in told["saved"]] == [True, True], "the second one without being told"
    assert told["saved"] == told["usual"], "the same bytes"
    assert "saved memory" in told["hopeless"]["error"]
    assert told["after"]["losses"] == told["usual"][0]["losses"], "the process is as good as before"


def test_a_unit_that_runs_out_of_memory_is_done_with_less_and_gives_the_same_bytes(
    digits_model: Path, tmp_path: Path
) -> None:
    told = told_by(
        PROGRAM, str(tmp_path / "made"), str(digits_model), str(TIGHT), str(HOPELESS), environment=EXACT_MALLOC
    )
    check(told, "cpu (")
    assert names(told["refused"]["error"], "RLIMIT_DATA")


@pytest.mark.gpu
def test_a_gpu_that_runs_out_of_memory_does_it_with_less_and_gives_the_same_bytes(
    digits_model: Path, tmp_path: Path
) -> None:
    limits = gpu_limits(tmp_path, digits_model)
    told = told_by(PROGRAM, str(tmp_path / "made"), str(digits_model), *limits, environment=ON_GPU)
    check(told, torch.cuda.get_device_name(0))
    assert names(told["refused"]["error"], "pieces")


@pytest.mark.gpu
def test_a_gpu_is_given_back_what_lay_idle_before_a_unit(digits_model: Path, tmp_path: Path) -> None:
    told = told_by(
        """
import json, sys, torch
from pathlib import Path
from tests.workers.limited_memory import BLOCKS, make_run, shared_unit
from workers.distillation_worker import DistillationWorker

settings, cache = make_run(Path(sys.argv[1]), Path(sys.argv[2]))
worker, unit = DistillationWorker(settings), shared_unit(settings, cache, "a", BLOCKS[0]).payload
cache.do(worker, "distillation", unit)
idle = torch.empty(8 * 2**30, dtype=torch.uint8, device="cuda")
del idle
before = torch.cuda.memory_reserved()
cache.do(worker, "distillation", unit)
print(json.dumps({"before": before, "after": torch.cuda.memory_reserved()}))
""",
        *(str(tmp_path / "made"), str(digits_model)),
        environment=ON_GPU,
    )
    assert told["before"] > 8 * 2**30 > told["after"]


def gpu_limits(folder: Path, digits_model: Path) -> tuple[str, str]:
    """MiB: a little less than the tensors of the first block take as usual, which both blocks must fit in with less; and a
    quarter of what they take then."""
    peaks = told_by(
        """
import json, sys, torch
from pathlib import Path
from tests.workers.limited_memory import BLOCKS, LimitedDistillation, make_run, shared_unit

class Watched(LimitedDistillation):
    def _read_ahead(self):
        super()._read_ahead()
        torch.cuda.reset_peak_memory_stats()
        self.base = torch.cuda.memory_allocated()

settings, cache = make_run(Path(sys.argv[1]), Path(sys.argv[2]))
peaks = []
for save in (False, False, True):  # the first one makes the workspaces of libraries
    worker = Watched(settings)
    if save:
        worker.save_memory()
    for block in BLOCKS:
        cache.do(worker, "distillation", shared_unit(settings, cache, "a", block).payload)
        peaks.append((torch.cuda.max_memory_allocated() - worker.base) / 2**20)
print(json.dumps({"usual": peaks[2:4], "lean": peaks[4:]}))
""",
        *(str(folder / "measured"), str(digits_model)),
        environment=ON_GPU,
    )
    usual, lean = peaks["usual"][0], max(peaks["lean"])
    assert lean < 0.8 * usual, peaks
    return str(round(0.95 * usual)), str(round(lean / 4))


class Recorder(PoolEvents):
    """Remembers what happened, by unit."""

    def __init__(self) -> None:
        self.events: dict[str, list[str]] = {}

    def finished(self, name: str, result: UnitOutput, seconds: float, attempt: int) -> None:
        self.events.setdefault(name, []).append(f"{attempt} done{' lean' if result.lean else ''}")

    def failed(self, name: str, attempt: int, error: str, will_retry: bool, *, out_of_memory: bool = False) -> None:
        reason = "out of memory" if out_of_memory else error
        self.events.setdefault(name, []).append(f"{attempt} {reason}{', again' if will_retry else ''}")


@pytest.mark.slow
@pytest.mark.ray
def test_a_pool_tries_with_less_memory_then_in_a_new_process_then_gives_up(
    digits_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**EXACT_MALLOC, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(LIMITS, json.dumps({"first": TIGHT, "second": TIGHT, "hopeless": HOPELESS}))
    (settings, cache), recorder = make_run(tmp_path / "made", digits_model), Recorder()
    blocks = {"first": BLOCKS[0], "second": BLOCKS[1], "hopeless": BLOCKS[0], "last": BLOCKS[1]}
    units = [Unit(name, shared_unit(settings, cache, name, block)) for name, block in blocks.items()]
    with ray_session(SessionSettings(num_cpus=1)), pytest.raises(UnitsFailed) as caught:
        run_units(SharedWorker, None, units, num_workers=1, stall_timeout_s=120.0, events=recorder, max_attempts=9)
    assert recorder.events == {
        "first": ["1 out of memory, again", "2 done lean"],
        "second": ["1 done lean"],
        "hopeless": ["1 out of memory, again", "2 out of memory"],
        "last": ["1 done"],
    }
    assert caught.value.failures.keys() == {"hopeless"}
    assert names(caught.value.failures["hopeless"].error, "distillation/hopeless", "saved memory")


def refusal(what: Any) -> BaseException:
    try:
        what()
    except (MemoryError, RuntimeError) as error:
        return error
    raise AssertionError("it was not refused")


def test_what_is_out_of_memory_and_what_is_not() -> None:
    far_too_much = 2**60
    assert is_out_of_memory(refusal(lambda: torch.empty(far_too_much, dtype=torch.uint8)))
    assert is_out_of_memory(refusal(lambda: np.empty(far_too_much, dtype=np.uint8)))
    assert is_out_of_memory(refusal(lambda: bytearray(far_too_much)))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    wrapped = RuntimeError("the block could not be read")
    wrapped.__cause__ = MemoryError()
    assert is_out_of_memory(wrapped)
    nccl = "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\nLast error:\n"
    assert is_out_of_memory(RuntimeError(nccl + "Failed to CUDA calloc async 6291456 bytes"))
    assert is_out_of_memory(RuntimeError(nccl + "Cuda failure 2 'out of memory'"))
    assert not is_out_of_memory(RuntimeError(nccl + "Cuda failure 1 'invalid argument'"))
    assert not is_out_of_memory(refusal(lambda: torch.ones(2) @ torch.ones(3)))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
