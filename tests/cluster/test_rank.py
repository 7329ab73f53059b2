"""When a process counts as gone: its memory is free again then."""

import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from cluster.rank import _birth_of

FIRST_THREAD_ENDS = """
import ctypes, sys, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[sys.argv[1]], 0)
"""
"""`exit` of this thread alone, as the kernel knows it."""


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="has another number for the system call")
def test_a_process_is_gone_with_its_last_thread() -> None:
    process = subprocess.Popen([sys.executable, "-c", FIRST_THREAD_ENDS, platform.machine()])
    try:
        deadline = time.monotonic() + 200
        while state_of(process.pid) != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert _birth_of(process.pid) is not None, "a thread of it goes on"
        os.kill(process.pid, signal.SIGKILL)
        while _birth_of(process.pid) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert state_of(process.pid) == "Z", "nobody has asked for its end yet"
    finally:
        process.kill()
        process.wait()
    assert _birth_of(process.pid) is None
    assert _birth_of(os.getpid()) == _birth_of(os.getpid()) is not None
