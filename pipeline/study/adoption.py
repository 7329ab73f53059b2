"""A unit that another run of the study has done is taken over: its files are linked (in a bucket: copied by the server), and a
record is written as usual.

A linked file belongs to both runs, so nobody may ever write into it. Nobody does: everything that writes a unit's outputs
makes a new file or folder beside the old one and renames it into place (`storage.calibration_store`, `storage.atomic_files`,
`write_block_artifact` and `write_checkpoint` of reelquant), which takes the name away from the old file and leaves the other
runs theirs. `drop_damaged` and `sweep_partial_files` remove names only.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.context import Run
from storage.manifest import DamagedRecord, UnitRecord


def adopt(record: UnitRecord, *, source: Run, source_label: str, taker: Run) -> list[str]:
    """Makes a unit that `source` has done a done unit of `taker`; both runs are under this driver's lock.

    The record is the source's but for its worker, which names the source, and for what the store calls its files; paths of
    outputs are relative to the run, and the same because the unit's name is.

    Returns:
        why it was not done: what is wrong with the source's outputs. Empty when it was.

    Raises:
        OSError: files cannot be linked or copied.
    """
    if problems := source.manifest.missing_or_damaged(record, deep=False):
        return problems
    _remove_older(record, taker)
    try:
        outputs = taker.directory.store.adopt(record.outputs, source.directory.store)
    except ValueError as error:
        return [str(error)]
    taker.directory.calibration_store.adopted(outputs)
    taker.manifest.write(replace(record, outputs=outputs, worker=f"adopted from {source_label}"))
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
            taker.directory.store.remove(output.path)
