"""Local room of a process: gone with it, and after a kill gone with the next one that needs room."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HOLDER = """
import sys
from storage.scratch import scratch_folder, scratch_root
with scratch_folder() as folder:
    (folder / "file").write_text("content")
    print(scratch_root(), flush=True)
    sys.stdin.read()
"""


BESIDE = """
import sys
from pathlib import Path
from storage.scratch import locked_folder
with locked_folder(Path(sys.argv[1]), ".[run]-measure-") as folder:
    (folder / "file").write_text("content")
    print(folder, flush=True)
    sys.stdin.read()
"""


def start(base: Path, program: str = HOLDER) -> tuple[subprocess.Popen[str], Path]:
    """A process with a file in its room, until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(base)], cwd=ROOT, env={**os.environ, "TMPDIR": str(base)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("program", [HOLDER, BESIDE])
def test_room_goes_with_its_process_and_a_killed_ones_with_the_next(tmp_path: Path, program: str) -> None:
    killed, left = start(tmp_path, program)
    alive, kept = start(tmp_path, program)
    killed.kill()
    killed.communicate()
    assert left.is_dir()
    last, _ = start(tmp_path, program)
    assert not left.exists()
    assert kept.is_dir()
    for process in (alive, last):
        process.communicate("", timeout=30)
        assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []
