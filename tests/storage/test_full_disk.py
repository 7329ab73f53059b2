"""A disk that fills up: the error names path and bytes, nothing half-written stays, older arrays are intact."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from storage.atomic_files import write_bytes_atomic
from tests.errors import names, raises
from tests.storage.stores import U, done, unit_store

ROOT = Path(__file__).resolve().parents[2]

_LIMITED_WRITER = """
import resource, signal, sys, torch
from pathlib import Path
from storage.atomic_files import write_bytes_atomic
from tests.storage.stores import unit_store

resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
run = Path(sys.argv[1])


def write_array():
    with unit_store(run) as store:
        store.write("trajectories/u/a", torch.ones(1000, 10))
        print(store.folder)
        store.write("trajectories/u/b", torch.ones(1000, 1000))


for action in (write_array, lambda: write_bytes_atomic(run / "file", bytes(400_000))):
    try:
        action()
    except OSError as error:
        print(error)
    else:
        sys.exit("no error")
"""


def test_file_size_limit(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", _LIMITED_WRITER, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    folder, *lines = finished.stdout.splitlines()
    for line, path, num_bytes in zip(lines, (f"{folder}/b", tmp_path / "file"), (4_000_000, 400_000), strict=True):
        assert names(line, "File too large", num_bytes, "bytes are free", path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


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
    old = torch.arange(1000)
    kept = done(small_disk, "old", a=old)
    before = sorted(path for path in small_disk.rglob("*") if path.is_file())
    with pytest.raises(OSError) as got, unit_store(small_disk) as store:  # noqa: PT011 - looked at below
        store.write(U + "a", torch.ones(1000, 1000))
    assert names(str(got.value), store.folder / "a", 4000000, "bytes are free")
    assert got.value.filename == str(store.folder / "a")
    with raises(OSError, small_disk / "file", 2000000):
        write_bytes_atomic(small_disk / "file", bytes(2_000_000))
    assert sorted(path for path in small_disk.rglob("*") if path.is_file()) == before
    made = done(small_disk, "u", a=torch.ones(100, 1000))
    reader = unit_store(small_disk, "v", old=kept.fingerprint, u=made.fingerprint)
    assert torch.equal(reader.read("trajectories/old/a"), old)
    assert reader.read(U + "a").sum() == 100_000
