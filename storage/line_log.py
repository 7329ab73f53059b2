"""Text logs with one writer a file: lines are appended in a folder; in a bucket, where nothing can be appended to, each driver
writes numbered objects, the last one anew with every line until it is full."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from storage.location import Location
from storage.open_place import open_place
from storage.place import Place

PART_BYTES = 64 * 1024
"""Of one object."""


class LineLog(Protocol):
    """A log, for its writer."""

    def append(self, line: str) -> None:
        """Add a line, so that it is there after a kill. Raises OSError, naming the log."""


def open_log(location: Location, name: str) -> LineLog:
    """The log ``name``, such as ``logs/events.jsonl``, in a folder or bucket prefix."""
    return _FileLog(location / name) if isinstance(location, Path) else _ObjectLog(open_place(location), name)


def read_log(location: Location, name: str) -> Iterator[str]:
    """Its lines, oldest first; in a bucket driver by driver; empty if there is none."""
    if isinstance(location, Path):
        path = location / name
        if path.is_file():
            yield from path.read_text(encoding="utf-8").splitlines()
        return
    place, (folder, stem, suffix) = open_place(location), _parts_of(name)
    for part in place.names(folder):
        if part.startswith(f"{stem}-") and part.endswith(suffix):
            yield from place.read(f"{folder}/{part}").decode().splitlines()


class _FileLog:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._end_torn_line()

    def append(self, line: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}, writing the log", str(self._path)) from error

    def _end_torn_line(self) -> None:
        """A line cut short by a kill or a full disk must not take the next one with it."""
        if self._path.is_file() and self._path.stat().st_size > 0:
            with self._path.open("rb+") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")


class _ObjectLog:
    def __init__(self, place: Place, name: str) -> None:
        self._place, (self._folder, self._stem, self._suffix) = place, _parts_of(name)
        numbers = [int(part[len(self._stem) + 1 :].partition("-")[0]) for part in place.names(self._folder)]
        self._driver = f"{1 + max(numbers, default=0):06d}-{secrets.token_hex(4)}"
        self._part, self._text = 0, ""

    def append(self, line: str) -> None:
        self._text += f"{line}\n"
        key = f"{self._folder}/{self._stem}-{self._driver}-{self._part:06d}{self._suffix}"
        self._place.put(key, self._text.encode())
        if len(self._text) >= PART_BYTES:
            self._part, self._text = self._part + 1, ""


def _parts_of(name: str) -> tuple[str, str, str]:
    path = PurePosixPath(name)
    return str(path.parent), path.stem, path.suffix
