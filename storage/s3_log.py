"""A text log in a bucket, where nothing can be appended to: the driver writes numbered parts, each anew until it is full.

The parts carry the driver's epoch, so that every name has one writer; it rewrites what it wrote itself and reads nothing.
"""

import threading
from collections.abc import Iterator
from pathlib import PurePosixPath

from storage.s3_requests import Requests

FLUSH_S = 2.0
"""What a killed driver said in its last two seconds is lost; the manifest is not written here."""
PART_BYTES = 256 * 1024


class S3Log:
    """See :class:`storage.run_store.LineLog`; a failed write is raised by the next call."""

    def __init__(self, requests: Requests, folder: str, name: str, *, epoch: int) -> None:
        self._requests, self._folder, self._name = requests, folder, PurePosixPath(name)
        self._epoch, self._part = epoch, 0
        self._lines: list[str] = []
        self._num_bytes = 0
        self._dirty = False
        self._error: Exception | None = None
        self._changing, self._ended = threading.Lock(), threading.Event()
        self._flusher = threading.Thread(target=self._flush_often, name="event-log", daemon=True)
        self._flusher.start()

    def append(self, line: str) -> None:
        with self._changing:
            self._raise_error()
            self._lines.append(line)
            self._num_bytes += len(line) + 1
            self._dirty = True

    def close(self) -> None:
        self._ended.set()
        self._flusher.join()
        self._raise_error()
        self._flush()

    def _raise_error(self) -> None:
        if isinstance(self._error, OSError):
            raise self._error
        if self._error is not None:
            where = f"{self._requests.url}/{self._folder}"
            raise OSError(f"{where}: the event log cannot be written: {self._error}") from self._error

    def _flush_often(self) -> None:
        while not self._ended.wait(FLUSH_S):
            try:
                self._flush()
            except Exception as error:  # noqa: BLE001 - the next call raises it
                self._error = error
                return

    def _flush(self) -> None:
        with self._changing:
            if not self._dirty:
                return
            key = f"{self._folder}/{self._name.stem}-{self._epoch:06d}-{self._part:06d}{self._name.suffix}"
            content = "".join(f"{line}\n" for line in self._lines).encode()
            self._dirty = False
            if self._num_bytes >= PART_BYTES:
                self._part, self._lines, self._num_bytes = self._part + 1, [], 0
        self._requests.put(key, content)


def read_s3_log(requests: Requests, folder: str, name: str) -> Iterator[str]:
    """Lines of all parts, oldest driver first."""
    wanted = PurePosixPath(name)
    for part in requests.list_folder(folder)[0]:
        if part.startswith(f"{wanted.stem}-") and part.endswith(wanted.suffix):
            yield from requests.get(f"{folder}/{part}")[0].decode().splitlines()
