"""What is wanted of a run as local files: its checkpoint, for `from_pretrained`, and its report."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from storage.atomic_files import atomic_path, create_directory, sha256_file, write_bytes_atomic
from storage.cache import UnitRecord
from storage.location import Location
from storage.open_place import open_place
from storage.run_directory import EVALUATION, REPORT, RunDirectory

STAGE = "assembly"
_LINKED_FILM = re.compile(rb'<video src="%s/([A-Za-z0-9._=+-]+\.mp4)"' % EVALUATION.encode())


def fetch_checkpoint(location: Location, folder: Path, *, method: str | None = None) -> int:
    """Copies the checkpoint of the run at `location` to the new folder `folder`; returns the number of files.

    The folder is there with all files or not at all.

    Args:
        method: of several, the one whose checkpoint is wanted; None for the run's own.

    Raises:
        ValueError: no run, no such checkpoint yet, a file that is not what its record says, or a folder that is there already.
        OSError: the disk is full, or the store does not answer.
    """
    folder = folder.absolute()
    if os.path.lexists(folder):
        raise ValueError(f"{folder} is there already: give a new folder")
    directory = RunDirectory.open(location)
    record = _checkpoint_record(directory, method)
    try:
        source = directory.outputs({(STAGE, record.unit): record}).checkpoint(f"{STAGE}/{record.unit}")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{directory.location}: {error}: run it again, and it is made anew") from error
    create_directory(folder.parent)
    with atomic_path(folder) as written:
        for output in record.outputs:
            inside = PurePosixPath(output.path).relative_to(str(record.result["checkpoint"]))
            (written / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / inside, written / inside)
            if sha256_file(written / inside) != output.checksum:
                raise ValueError(
                    f"{directory.location}/{output.path} is not what its record says: run it again, and it is made anew"
                )
    return len(record.outputs)


def fetch_report(location: Location, folder: Path) -> Path:
    """Copies the report of a run into a local folder, with the films that it plays from beside it; returns the copy's path.

    The films go to a folder that has the run's name too, where the copy looks for them.
    """
    location = RunDirectory.open(location).location
    store = open_place(location)
    films = f"{location.name}-{EVALUATION}"
    page = store.read(REPORT)
    for name in sorted({found.decode() for found in _LINKED_FILM.findall(page)}):
        create_directory(folder / films)
        write_bytes_atomic(folder / films / name, store.read(f"{EVALUATION}/{name}"))
    copy = folder / f"{location.name}-{REPORT}"
    write_bytes_atomic(copy, _LINKED_FILM.sub(rb'<video src="' + quote(films).encode() + rb'/\1"', page))
    return copy


def fetch_file(location: Location, key: str, folder: Path) -> Path:
    """Copies a small file of a run or study into a local folder, under a name that says whose it is; returns the copy."""
    copy = folder / f"{location.name}-{key}"
    write_bytes_atomic(copy, open_place(location).read(key))
    return copy


def _checkpoint_record(directory: RunDirectory, method: str | None) -> UnitRecord:
    records = [found for found in directory.records(STAGE).values() if isinstance(found, UnitRecord)]
    wanted = [
        found
        for found in records
        if (directory.checkpoint_key() == found.result["checkpoint"] if method is None else method == found.unit)
    ]
    if not wanted:
        there = ", ".join(sorted(found.unit for found in records)) or "none yet"
        raise ValueError(
            f"{directory.location} has no checkpoint{f' of method {method}' if method else ''} (methods assembled: {there}): "
            "run it to its end, or name another method"
        )
    return wanted[0]
