"""Files that were hashed, with their size and time: ``hashed.jsonl``, so that a driver's start reads only the others.

One JSON object a line, ``{"<path>": [bytes, mtime in ns, SHA-256], ...}``; a later line counts. A file whose size and
modification time are still those of its line is taken to have the content that was hashed. So a file that is written anew is
hashed again, and one that was changed behind the file system's back (damage on the disk; a tool that sets the time back) is not
found here: arrays have checksums that are compared whenever they are read, ``verify`` reads all of a checkpoint, and
``run --rehash`` hashes everything again. A bucket has none: its e_tags say more.
"""

from __future__ import annotations

import contextlib
import json

from storage.line_log import LineLog, open_log, read_log
from storage.location import Location
from storage.open_place import open_place
from storage.place import FileState

NAME = "hashed.jsonl"
"""Directly in the directory of the cache, and of a run for its checkpoints."""


class HashedFiles:
    """What is noted of the files below a location; read once."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._noted: dict[str, tuple[int, int, str]] | None = None
        self._new: dict[str, tuple[int, int, str]] = {}
        self._log: LineLog | None = None

    def holds(self, key: str, state: FileState, checksum: str) -> bool:
        """Whether the file was hashed, had this checksum, and looked as it does now."""
        return state.mtime_ns is not None and self._known().get(key) == (state.num_bytes, state.mtime_ns, checksum)

    def note(self, key: str, state: FileState, checksum: str) -> None:
        """Remember that the file was hashed and has this checksum; kept by :meth:`flush`."""
        if state.mtime_ns is not None and not self.holds(key, state, checksum):
            self._new[key] = self._known()[key] = (state.num_bytes, state.mtime_ns, checksum)

    def flush(self) -> None:
        """Keep what was noted."""
        if not self._new:
            return
        if self._log is None:
            self._log = open_log(self._location, NAME)
        self._log.append(json.dumps(self._new, separators=(",", ":")))
        self._new = {}

    def forget(self) -> None:
        """Everything is to be hashed again."""
        open_place(self._location).remove(NAME)
        self._noted, self._new, self._log = {}, {}, None

    def _known(self) -> dict[str, tuple[int, int, str]]:
        if self._noted is None:
            self._noted = {}
            for line in read_log(self._location, NAME):
                with contextlib.suppress(ValueError, TypeError, AttributeError):  # torn by a kill
                    self._noted.update({path: tuple(state) for path, state in json.loads(line).items()})
        return self._noted
