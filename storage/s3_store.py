"""A run below a prefix of an S3 bucket.

Every file is one object, put whole: it is there with all its bytes or not at all, and what a killed writer leaves cannot be
seen (parts of an upload that was cut off: a lifecycle rule of the bucket removes them). What must be made as a file is made in
:mod:`storage.scratch` and uploaded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp

from storage.atomic_files import explain_write_failure, sha256_file
from storage.local_store import LOCK_FILE
from storage.location import StoreUrl
from storage.output_file import OutputFile
from storage.run_store import Driver, LeaseLost, LineLog, RunStore, StoredFile, WriteLocally
from storage.s3_lease import S3Lease
from storage.s3_log import S3Log, read_s3_log
from storage.s3_requests import PART_BYTES, Requests, StoredObject
from storage.scratch import scratch_folder, scratch_root

_DOWNLOADS = 4
"""Ranges of a file that are asked for at a time."""
_UPLOADS = 4
"""Files of a folder that are sent at a time."""
LARGEST_COPY_BYTES = 5 * 2**30
"""Of an object that S3 copies in one request."""


class S3Store:
    """See :class:`storage.run_store.RunStore`; raises what :class:`storage.s3_requests.Requests` raises."""

    num_requests = 16

    def __init__(self, url: StoreUrl) -> None:
        self._url = url
        self._requests = Requests(url)
        self._lease = S3Lease(self._requests, LOCK_FILE)
        self._listing: dict[str, StoredObject] | None = None
        self._copied: tuple[tuple[StoredObject, ...], Path] | None = None

    @property
    def location(self) -> StoreUrl:
        return self._url

    @property
    def epoch(self) -> int:
        return self._lease.epoch

    def read(self, key: str) -> bytes:
        return self._requests.get(key)[0]

    def stat(self, key: str) -> StoredFile:
        if self._listing is None:
            found = self._requests.head(key)
        elif key in self._listing:
            found = self._listing[key]
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._url / key))
        return StoredFile(found.num_bytes, (found.e_tag, found.num_bytes), found.e_tag)

    @contextlib.contextmanager
    def listed(self) -> Iterator[None]:
        self._listing = {found.key: found for found in self._requests.list_all("")}
        try:
            yield
        finally:
            self._listing = None

    def checksum(self, key: str) -> str:
        digest = hashlib.sha256()
        for piece in self._pieces(self._requests.head(key)):
            digest.update(piece)
        return digest.hexdigest()

    def put(self, key: str, data: bytes, *, exclusive: bool = False) -> OutputFile:
        e_tag = self._requests.create(key, data) if exclusive else self._requests.put(key, data)
        return OutputFile(key, len(data), hashlib.sha256(data).hexdigest(), e_tag)

    def put_record(self, key: str, data: bytes, *, is_newer: Callable[[bytes], bool]) -> None:
        self._lease.check()
        while True:
            with contextlib.suppress(FileExistsError):
                self._requests.create(key, data)
                return
            try:
                found, e_tag = self._requests.get(key)
            except FileNotFoundError:
                continue
            if is_newer(found):
                raise LeaseLost(f"{self.location}/{key} was written by a later driver of this run: leave the run to it")
            with contextlib.suppress(FileExistsError):
                self._requests.replace(key, data, e_tag=e_tag)
                return

    def publish(
        self, key: str, write: WriteLocally, *, last: str | None = None, num_bytes: int | None = None
    ) -> tuple[OutputFile, ...]:
        with scratch_folder() as scratch:
            path = scratch / PurePosixPath(key).name
            with explain_write_failure(path, num_bytes):
                write(path)
            if not path.is_dir():
                return (self._upload(key, path),)
            names = sorted(found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file())
            older = [found.key for found in self._requests.list_all(key)]
            if last is not None:
                self._requests.delete([f"{key}/{last}"] if f"{key}/{last}" in older else [])
            self._requests.delete([name for name in older if name.removeprefix(f"{key}/") not in names])
            others, end = [n for n in names if n != last], [n for n in names if n == last]
            with ThreadPoolExecutor(_UPLOADS, thread_name_prefix="upload") as pool:
                uploaded = list(pool.map(lambda name: self._upload(f"{key}/{name}", path / name), others))
            uploaded += [self._upload(f"{key}/{name}", path / name) for name in end]
            return tuple(sorted(uploaded, key=lambda output: output.path))

    def adopt(self, outputs: Sequence[OutputFile], source: RunStore) -> tuple[OutputFile, ...]:
        assert isinstance(source, S3Store)
        with ThreadPoolExecutor(self.num_requests, thread_name_prefix="adopt") as pool:
            return tuple(pool.map(lambda output: self._adopt(output, source), outputs))

    def _adopt(self, output: OutputFile, source: S3Store) -> OutputFile:
        original = source._requests.head(output.path)
        if original.e_tag != output.e_tag and source.checksum(output.path) != output.checksum:
            raise ValueError(f"{output.path}: SHA-256 of {source.location}/{output.path} differs from the record")
        if output.num_bytes <= LARGEST_COPY_BYTES and source._url.bucket == self._url.bucket:
            self._requests.copy(output.path, source._url)
        else:
            with source.local_files([output.path]) as [path]:
                self._requests.put(output.path, path)
        if source._requests.head(output.path) != original:
            raise ValueError(f"{output.path}: {source.location}/{output.path} was replaced while it was copied")
        copied = self._requests.head(output.path)
        if copied.num_bytes != output.num_bytes:
            raise ValueError(f"{output.path}: {copied.num_bytes} bytes arrived, {output.num_bytes} expected")
        return replace(output, e_tag=copied.e_tag)

    @contextlib.contextmanager
    def local_files(self, keys: Sequence[str]) -> Iterator[list[Path]]:
        with scratch_folder() as scratch:
            yield [self._download(self._requests.head(key), scratch / key) for key in keys]

    def local_folder(self, key: str) -> Path:
        found = tuple(self._requests.list_all(key))
        if not found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._url / key))
        if self._copied is None or self._copied[0] != found:
            # One is kept: checkpoints are large. Files that are open stay readable.
            if self._copied is not None:
                shutil.rmtree(self._copied[1], ignore_errors=True)
            folder = Path(mkdtemp(dir=scratch_root()))
            for file in found:
                self._download(file, folder / file.key)
            self._copied = found, folder
        return self._copied[1] / key

    def names(self, folder: str) -> list[str]:
        return self._requests.list_folder(folder)[0]

    def subfolders(self, folder: str) -> list[str]:
        return self._requests.list_folder(folder)[1]

    def remove(self, key: str) -> None:
        self._requests.delete([key])

    def num_bytes(self) -> int:
        return sum(found.num_bytes for found in self._requests.list_all(""))

    def sweep(self) -> tuple[str, ...]:
        return ()

    def check_key(self, folder: str, name: str) -> None:
        """There are no links in a bucket."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return self._lease.held()

    def driver(self) -> Driver:
        return self._lease.driver()

    def open_log(self, folder: str, name: str) -> LineLog:
        return S3Log(self._requests, folder, name, epoch=self.epoch)

    def read_log(self, folder: str, name: str) -> Iterator[str]:
        yield from read_s3_log(self._requests, folder, name)

    def _upload(self, key: str, path: Path) -> OutputFile:
        return OutputFile(key, path.stat().st_size, sha256_file(path), self._requests.put(key, path))

    def _download(self, file: StoredObject, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        with explain_write_failure(target, file.num_bytes), open(target, "xb") as opened:
            for piece in self._pieces(file):
                opened.write(piece)
        return target

    def _pieces(self, file: StoredObject) -> Iterator[memoryview]:
        """The content in order, a few pieces ahead."""
        ranges = [(offset, min(PART_BYTES, file.num_bytes - offset)) for offset in range(0, file.num_bytes, PART_BYTES)]
        with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="download") as pool:
            for first in range(0, len(ranges), _DOWNLOADS):
                batch = ranges[first : first + _DOWNLOADS]
                yield from pool.map(lambda piece: self._requests.get_range(file.key, *piece), batch)
