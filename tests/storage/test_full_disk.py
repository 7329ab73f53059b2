"""A disk that fills up: the error names path and bytes, nothing half-written stays, the old array is intact."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from storage.atomic_files import write_bytes_atomic
from storage.calibration_store import CalibrationStore
from tests.errors import names, raises

ROOT = Path(__file__).resolve().parents[2]

_LIMITED_WRITER = """
import resource, signal, sys, torch
from pathlib import Path
from storage.atomic_files import write_bytes_atomic
from storage.calibration_store import CalibrationStore

resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
run = Path(sys.argv[1])
store = CalibrationStore(run / "calibration.zarr")
store.write("a", torch.ones(1000, 10))
for action in (
    lambda: store.write("a", torch.ones(1000, 1000)),
    lambda: store.write("new/b", torch.ones(1000, 1000)),
    lambda: write_bytes_atomic(run / "file", bytes(400_000)),
):
    try:
        action()
    except OSError as error:
        print(error)
    else:
        sys.exit("no error")
assert store.read("a").sum() == 10_000
"""


def test_file_size_limit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _LIMITED_WRITER, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    paths = (tmp_path / "calibration.zarr/a", tmp_path / "calibration.zarr/new/b", tmp_path / "file")
    for line, path, num_bytes in zip(lines, paths, (4_000_000, 4_000_000, 400_000), strict=True):
        assert names(line, "File too large", num_bytes, "bytes are free", path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == [
        "a", "c.0.0", "calibration.zarr", "new", "zarr.json", "zarr.json", "zarr.json",
    ]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root; test_file_size_limit covers the path without")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no permission to mount here; test_file_size_limit covers the path without")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


def test_disk_that_is_full(small_disk: Path) -> None:
    store = CalibrationStore(small_disk / "calibration.zarr")
    old = torch.arange(1000)
    store.write("a", old)
    before = sorted(small_disk.rglob("*"))
    for name in ("a", "b"):
        with raises(OSError, store.root / name, 4000000, "bytes are free") as got:
            store.write(name, torch.ones(1000, 1000))
        assert got.value.filename == str(store.root / name)
    with raises(OSError, small_disk / "file", 2000000):
        write_bytes_atomic(small_disk / "file", bytes(2_000_000))
    assert sorted(small_disk.rglob("*")) == before
    assert torch.equal(store.read("a"), old)
    store.write("b", torch.ones(100, 1000))
    assert store.read("b").sum() == 100_000
