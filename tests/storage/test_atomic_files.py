import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.atomic_files import (
    atomic_path,
    create_directory,
    json_bytes,
    partial_path,
    remove_folder,
    sha256_file,
    sweep_partial_files,
    write_bytes_atomic,
)
from tests.errors import raises


def test_bytes_arrive_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"old")
    write_bytes_atomic(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_a_file_or_folder_is_there_when_its_writer_is_done_and_not_when_it_fails(tmp_path: Path) -> None:
    folder, file = tmp_path / "a[b]", tmp_path / "video.mp4"
    for content in ("first", "second"):
        with atomic_path(folder) as written, atomic_path(file) as single:
            (written / "deep").mkdir(parents=True)
            (written / "deep" / "file").write_text(content)
            single.write_text(content)
            assert (written.name, single.name) == (folder.name, file.name)
    for target in (folder, file):
        with raises(OSError, "full"), atomic_path(target) as written:
            written.touch()
            raise OSError("the disk is full")
    assert (folder / "deep" / "file").read_text() == file.read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == [folder.name, file.name]


def test_what_was_swept_from_under_a_writer_is_not_put_in_place(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with raises(FileNotFoundError, tmp_path), atomic_path(tmp_path / "out") as written:
        written.mkdir()
        assert sweep_partial_files(tmp_path) == (written.parent.name,)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["old"]


def test_exclusive_keeps_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        write_bytes_atomic(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_equal_json_gives_equal_bytes_and_nan_is_refused() -> None:
    first = json_bytes({"b": [1, 2.5], "a": "ü"})
    assert first == json_bytes({"a": "ü", "b": [1, 2.5]})
    assert json.loads(first) == {"a": "ü", "b": [1, 2.5]}
    with raises(ValueError, "inf"):
        json_bytes({"psnr": float("inf")})


def test_sha256_of_a_known_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_failed_write_leaves_nothing_and_names_path_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with raises(OSError, tmp_path / "a.bin", 5, "bytes are free") as caught:
        write_bytes_atomic(tmp_path / "a.bin", b"newer")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a.bin")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_directories_are_created_with_their_parents(tmp_path: Path) -> None:
    create_directory(tmp_path / "a" / "b" / "c")
    create_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        create_directory(tmp_path / "file")


def test_sweep_removes_partial_files_and_folders_only(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".x.1.partial").write_bytes(b"not ours")
    root = tmp_path / "run"
    (root / "deep").mkdir(parents=True)
    folder = partial_path(root / "deep" / "array")
    folder.mkdir()
    (folder / "c.0").write_bytes(b"half")
    file = partial_path(root / "config.json")
    file.write_bytes(b"{")
    (root / "keep.partial").write_bytes(b"a name of the user's")
    (root / "link").symlink_to(outside)
    (root / ".link.1.partial").symlink_to(outside)

    removed = sweep_partial_files(root)

    assert removed == tuple(sorted((".link.1.partial", file.name, f"deep/{folder.name}")))
    assert sorted(entry.name for entry in root.iterdir()) == ["deep", "keep.partial", "link"]
    assert (outside / ".x.1.partial").exists()
    assert sweep_partial_files(root) == ()
    assert sweep_partial_files(tmp_path / "absent") == ()


def test_two_remove_one_folder_at_the_same_time(tmp_path: Path) -> None:
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        for inside in ("a/b", "c"):
            (folder / inside).mkdir(parents=True)
            for index in range(200):
                (folder / inside / str(index)).touch()
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(remove_folder, [folder] * 3)) == [None] * 3
        assert not folder.exists()
