"""Files of a run that were hashed, with their size and time: ``hashed.jsonl``, so that a driver's start reads only the others.

One JSON object a line, ``{"<path>": [bytes, mtime in ns, SHA-256], ...}``; a later line counts. A file whose size and
modification time are still those of its line is taken to have the content that was hashed. So a file that is written anew is
hashed again, and one that was changed behind the file system's back (damage on the disk; a tool that sets the time back) is not
found here: arrays have checksums that are compared whenever they are read, ``verify`` reads all of a checkpoint, and
``run --rehash`` hashes everything again. The run's driver alone writes the file. A bucket has none: its e_tags say more.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable

from storage.location import StoreUrl
from storage.output_file import OutputFile
from storage.run_store import LineLog, RunStore

NAME = "hashed.jsonl"
"""Directly in the run directory."""


class HashedFiles:
    """What is noted of a run's files; read once."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._in_bucket = isinstance(store.location, StoreUrl)
        self._noted: dict[str, tuple[int, int, str]] | None = None
        self._log: LineLog | None = None

    def holds(self, output: OutputFile) -> bool:
        """Whether the file was hashed, had the checksum of ``output``, and looks as it did then."""
        if self._in_bucket or output.path not in self._known():
            return False
        return self._known()[output.path] == self._now(output)

    def note(self, outputs: Iterable[OutputFile]) -> None:
        """Remember that the files were hashed and have the checksums of ``outputs``."""
        if self._in_bucket:
            return
        known = self._known()
        found = {output.path: state for output in outputs if (state := self._now(output)) is not None}
        new = {path: state for path, state in found.items() if known.get(path) != state}
        if not new:
            return
        if self._log is None:
            self._log = self._store.open_log("", NAME)
        self._log.append(json.dumps(new, separators=(",", ":")))
        known.update(new)

    def forget(self) -> None:
        """Everything is to be hashed again."""
        self._store.remove(NAME)
        self._noted, self._log = {}, None

    def _now(self, output: OutputFile) -> tuple[int, int, str] | None:
        try:
            found = self._store.stat(output.path)
        except (FileNotFoundError, ValueError):
            return None
        return None if found.mtime_ns is None else (found.num_bytes, found.mtime_ns, output.checksum)

    def _known(self) -> dict[str, tuple[int, int, str]]:
        if self._noted is None:
            self._noted = {}
            for line in self._store.read_log("", NAME):
                with contextlib.suppress(ValueError, TypeError, AttributeError):  # torn by a kill
                    self._noted.update({path: tuple(state) for path, state in json.loads(line).items()})
        return self._noted
