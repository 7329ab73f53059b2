"""Outputs of done units by their logical names, ``<stage>/<unit>/<output>``: arrays, files, checkpoints.

Only what a unit's record names is opened: in a folder where it lies, in a bucket a copy whose SHA-256 is the recorded one.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from storage.atomic_files import sha256_file
from storage.cache import Cache, UnitRecord
from storage.location import Location, StoreUrl
from storage.open_place import open_place
from storage.output_file import OutputFile
from storage.place import StoreUnreachable
from storage.scratch import scratch_root

if TYPE_CHECKING:  # torch and zarr are imported where an array is touched
    import torch

METADATA_FILE = "zarr.json"
"""Of an array or a group."""


class DamagedArray(ValueError):
    """An array that is missing, short, corrupt or not finite."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"calibration array {self.name!r}: {self.reason}; redo the unit that wrote it"


class RecordedOutputs:
    """Outputs of units.

    Args:
        cache: where their records lie.
        run: where the checkpoints lie.
        record_of: the record of a unit by stage and name; None where it is not done.
    """

    def __init__(self, cache: Location, run: Location, record_of: Callable[[str, str], UnitRecord | None]) -> None:
        self.cache, self.run = Cache(cache), open_place(run)
        self._record_of = record_of
        self._scratch: Path | None = None
        self._changing = threading.Lock()

    def read(self, name: str, *, rows: slice | None = None) -> torch.Tensor:
        """Read the array ``name``, or the given rows of dimension 0, with every checksum on the way verified.

        Args:
            name: of letters, digits and ``. _ = + -``, such as ``trajectories/prompt-000/latents``.
            rows: ``slice(start, stop)`` with the bounds of Python's slices, but inside the array; in a folder only the chunks
                (of up to 16 MiB) that it touches are read.

        Returns:
            A CPU tensor of the written dtype that owns its memory.

        Raises:
            DamagedArray: missing, short, corrupt, NaN or infinite; says which file and what.
            ValueError: rows with a step or outside the array.
        """
        from storage.arrays import read_array

        folder, shape = self._opened(name)
        if rows is not None:
            _check_rows(name, shape, rows)
        try:
            return read_array(folder, rows)
        except (ValueError, OSError) as error:
            raise DamagedArray(name, f"{error} (in {folder})") from error
        finally:
            if rows is None and self._scratch is not None and folder.is_relative_to(self._scratch):
                shutil.rmtree(folder, ignore_errors=True)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the array ``name``, from its metadata alone. Raises as :meth:`read`."""
        return self._opened(name, only=METADATA_FILE)[1]

    def file(self, name: str) -> Path:
        """Local path of a file, to be read only. Raises DamagedArray."""
        folder, outputs = self._located(name)
        return folder / outputs[0].path

    def checkpoint(self, unit: str) -> Path:
        """Local folder of the checkpoint of an assembled method, to be read only: ``assembly/<method>``.

        One of a bucket is kept until another one is asked for: checkpoints are large."""
        stage, _, name = unit.partition("/")
        record = self._recorded(stage, name)
        folder = str(record.result["checkpoint"])
        if not isinstance(self.run.location, StoreUrl):
            return self.run.local("", record.outputs, Path()) / folder
        key = f"{self.run.location}/{record.fingerprint}"
        if key not in _kept:
            for older in _kept.values():  # files that are open stay readable
                shutil.rmtree(older, ignore_errors=True)
            _kept.clear()
            scratch = Path(mkdtemp(dir=scratch_root()))
            self.run.local("", record.outputs, scratch)
            _kept[key] = scratch
        return _kept[key] / folder

    def identity(self, name: str) -> str:
        """Name of an output that is the same for equal contents in all runs, and no other's."""
        stage, unit, inside = _parts(name)
        return f"{self._recorded(stage, unit).key}/{inside}"

    def _recorded(self, stage: str, unit: str) -> UnitRecord:
        record = self._record_of(stage, unit)
        if record is None:
            raise DamagedArray(f"{stage}/{unit}", "the unit is not done")
        return record

    def _opened(self, name: str, *, only: str | None = None) -> tuple[Path, tuple[int, ...]]:
        """Local folder of an array, whose metadata is as recorded, and its shape."""
        folder, outputs = self._located(name, only=only)
        inside = _parts(name)[2]
        metadata = folder / inside / METADATA_FILE
        recorded = [output.checksum for output in outputs if output.path == f"{inside}/{METADATA_FILE}"]
        try:
            if recorded != [sha256_file(metadata)]:
                raise DamagedArray(name, f"{METADATA_FILE} is not the recorded one (in {metadata.parent})")
            return metadata.parent, tuple(json.loads(metadata.read_bytes())["shape"])
        except FileNotFoundError as error:
            raise DamagedArray(name, f"{METADATA_FILE} is missing in {metadata.parent}") from error

    def _located(self, name: str, *, only: str | None = None) -> tuple[Path, list[OutputFile]]:
        """Local folder of the attempt that a unit's record names, and the files of the output ``name`` in it.

        Args:
            only: name of the one file of an array that is needed.
        """
        stage, unit, inside = _parts(name)
        record = self._recorded(stage, unit)
        place, key = self.cache.files_of(record, self.run)
        outputs = [o for o in record.outputs if o.path == inside or o.path.startswith(f"{inside}/")]
        if only is not None:
            outputs = [o for o in outputs if o.path == f"{inside}/{only}"]
        if not outputs:
            raise DamagedArray(name, f"it is no output of the unit (in {self.cache.location / record.key})")
        try:
            return place.local(key, outputs, self._scratch_folder()), outputs
        except (StoreUnreachable, PermissionError):  # says nothing about the array
            raise
        except (ValueError, OSError) as error:
            raise DamagedArray(name, f"{error}") from error

    def _scratch_folder(self) -> Path:
        if not isinstance(self.cache.location, StoreUrl):
            return Path()
        with self._changing:
            if self._scratch is None:
                self._scratch = Path(mkdtemp(dir=scratch_root()))
            return self._scratch

    def close(self) -> None:
        """Remove copies."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None


_kept: dict[str, Path] = {}
"""The copy of a bucket's checkpoint that this process has, by run and fingerprint."""


def _parts(name: str) -> tuple[str, str, str]:
    """Stage, unit and output of a logical name."""
    parts: Any = name.split("/", 2)
    if len(parts) < 3:
        raise ValueError(f"output name {name!r} must be <stage>/<unit>/<output>")
    return tuple(parts)


def _check_rows(name: str, shape: tuple[int, ...], rows: slice) -> None:
    """Zarr cuts bounds outside of an array without a word."""
    if not shape or rows.step not in (None, 1):
        raise ValueError(f"rows of {name!r} must be slice(start, stop) of an array with dimensions, got {rows}")
    for bound in (rows.start, rows.stop):
        if bound is not None and not -shape[0] <= bound <= shape[0]:
            raise ValueError(f"rows {rows.start}:{rows.stop} of {name!r} are outside its {shape[0]} rows")
