"""A unit that another run of the study has done is taken over: its files are linked, and a record is written as usual.

A linked file belongs to both runs, so nobody may ever write into it. Nobody does: everything that writes a unit's outputs
makes a new file or folder beside the old one and renames it into place (`storage.calibration_store`, `storage.atomic_files`,
`write_block_artifact` and `write_checkpoint` of reelquant), which takes the name away from the old file and leaves the other
runs theirs. `drop_damaged` and `sweep_partial_files` remove names only.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

from pipeline.context import Run
from storage.atomic_files import create_directory, partial_path, sha256_file, sync_directory, sync_file
from storage.manifest import DamagedRecord, OutputFile, UnitRecord
from storage.zarr_layout import METADATA_FILE

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)


def adopt(record: UnitRecord, *, source: Run, source_label: str, taker: Run) -> list[str]:
    """Makes a unit that `source` has done a done unit of `taker`; both runs are under this driver's lock.

    The record is the source's but for its worker, which names the source; paths of outputs are relative to the run, and the
    same because the unit's name is.

    Returns:
        why it was not done: what is wrong with the source's outputs. Empty when it was.

    Raises:
        OSError: files cannot be linked or copied.
    """
    if problems := source.manifest.missing_or_damaged(record, deep=False):
        return problems
    _remove_older(record, taker)
    for output in record.outputs:
        if problem := _take(output, source.directory.path, taker.directory.path):
            return [problem]
    for directory in {(taker.directory.path / output.path).parent for output in record.outputs}:
        sync_directory(directory)
    taker.manifest.write(replace(record, worker=f"adopted from {source_label}"))
    return []


def _remove_older(record: UnitRecord, taker: Run) -> None:
    """What an earlier configuration wrote under this name must not stay beside the new files."""
    try:
        older = taker.manifest.read(record.stage, record.unit)
    except DamagedRecord:
        older = None
    taker.manifest.remove(record.stage, record.unit)
    kept = {output.path for output in record.outputs}
    for output in older.outputs if older is not None else ():
        if output.path not in kept:
            (taker.directory.path / output.path).unlink(missing_ok=True)


def _take(output: OutputFile, source: Path, taker: Path) -> str | None:
    """One file; the problem if a copy is not what the record says."""
    original, target = source / output.path, taker / output.path
    create_directory(target.parent)
    for folder in Path(output.path).parents:
        _take_group(source / folder, taker / folder)
    if target.exists() and target.samefile(original):
        return None
    partial = partial_path(target)
    try:
        if not _link(original, partial):
            shutil.copyfile(original, partial)
            sync_file(partial)
            if sha256_file(partial) != output.checksum:
                return f"{output.path}: SHA-256 of {original} differs from the record"
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return None


def _link(original: Path, target: Path) -> bool:
    try:
        os.link(original, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    return True


def _take_group(source: Path, taker: Path) -> None:
    """The metadata of the Zarr groups above an array are no unit's outputs; without them other readers find no store."""
    if (source / METADATA_FILE).is_file() and not (taker / METADATA_FILE).exists():
        partial = partial_path(taker / METADATA_FILE)
        shutil.copyfile(source / METADATA_FILE, partial)
        sync_file(partial)
        os.replace(partial, taker / METADATA_FILE)
