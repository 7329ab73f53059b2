"""The calibration store: tensors by name, one Zarr v3 array each, whole or absent.

Any Zarr reader opens the arrays; ``storage.zarr_array`` says what lies where. What zarr does not give is added here: files
that are synced and in place together, a missing file as an error, and neither NaN nor infinity.

An array is written once by one writer: in a folder into a hidden directory, synced, and renamed; in a bucket as whole
objects, the metadata last. A kill leaves the old array, the new one or none; and at most a partial directory
(:meth:`CalibrationStore.sweep_partial_files`). When two write one name in a folder, the last one stands, whole. Equal tensors
give equal bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from storage.atomic_files import sweep_partial_files
from storage.location import StoreUrl, local_path, parse_location
from storage.open_store import open_store
from storage.output_file import OutputFile
from storage.run_store import StoreUnreachable

if TYPE_CHECKING:  # zarr is imported where an array is touched: it takes 0.2 s of CPU
    import zarr

METADATA_FILE = "zarr.json"
GROUP_METADATA = b'{\n  "attributes": {},\n  "zarr_format": 3,\n  "node_type": "group"\n}'
"""``zarr.json`` of a group, byte for byte what zarr writes."""

_COMPONENT = re.compile(r"(?!__)[A-Za-z0-9_][A-Za-z0-9._=+-]{0,127}")


class DamagedArray(ValueError):
    """An array that is missing, short, corrupt or not finite."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"calibration array {self.name!r}: {self.reason}; redo the unit that wrote it"


class CalibrationStore:
    """Named tensors under one directory, which is also a Zarr group.

    Args:
        root: the store's place, inside the run's; created by the first write.

    Names are relative POSIX paths (``activations/segment-03/sample-0007``) of letters, digits and ``. _ = + -``.
    Dtypes: bool, uint8, int8-int64, float16, bfloat16, float32, float64; any shape, scalars included.
    """

    def __init__(self, root: str | os.PathLike[str] | StoreUrl) -> None:
        self.location = parse_location(root)
        self._store = open_store(self.location.parent)

    @property
    def root(self) -> Path:
        """The store's directory. Raises ValueError where it is in a bucket."""
        return local_path(self.location, why="has no local directory")

    def write(self, name: str, tensor: torch.Tensor) -> tuple[OutputFile, ...]:
        """Write ``tensor`` durably as the array ``name``; replaces an older one.

        Memory beyond the tensor: a few chunks of 16 MiB; one CPU copy of a tensor that is not contiguous or not on the CPU.

        Returns:
            The files, relative to the parent of ``root`` (the run directory), for the unit's record; the metadata last.

        Raises:
            ValueError: NaN or infinity (how many, where the first), a dtype that cannot be stored, or a bad name.
            OSError: disk full and the like; names path and bytes, and nothing half-written stays.
        """
        from storage.zarr_array import check_storable, write_array

        key = self._locate(name)
        try:
            check_storable(tensor)
        except ValueError as error:
            raise ValueError(f"calibration array {name!r} is not written: {error}") from error
        if self._store.subfolders(key):
            raise ValueError(f"name {name!r} is a group of arrays in {self.location}: choose another name")
        self._create_groups([key])

        def write_files(folder: Path) -> None:
            folder.mkdir()
            write_array(folder, tensor)

        return self._store.publish(key, write_files, last=METADATA_FILE, num_bytes=tensor.nbytes)

    def read(self, name: str, *, rows: slice | None = None) -> torch.Tensor:
        """Read the array ``name``, or the given rows of dimension 0, with every checksum on the way verified.

        Args:
            name: as given to :meth:`write`.
            rows: ``slice(start, stop)`` with the bounds of Python's slices, but inside the array; reads and verifies
                only the files (chunks of up to 16 MiB) that it touches.

        Returns:
            A CPU tensor of the written dtype that owns its memory.

        Raises:
            DamagedArray: missing, short, corrupt, NaN or infinite; says which file and what.
            ValueError: bad name; rows with a step or outside the array.
        """
        from storage.zarr_array import read_rows

        array = self._open(name)
        start, stop = _row_bounds(name, array.shape, rows)
        try:
            return read_rows(array, start, stop)
        except StoreUnreachable:  # says nothing about the array
            raise
        except (ValueError, OSError) as error:
            raise DamagedArray(name, f"{error} (in {self.location / name})") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the array ``name``, from its metadata alone.

        Raises:
            DamagedArray: missing, or metadata that was not written by this class.
            ValueError: bad name.
        """
        return self._open(name).shape

    def adopted(self, outputs: Iterable[OutputFile]) -> None:
        """After files were taken over from another run (:meth:`storage.run_store.RunStore.adopt`): makes the groups above the
        arrays among them, which are no unit's outputs, and without which other readers find no store."""
        inside = f"{self.location.name}/"
        self._create_groups({str(PurePosixPath(o.path).parent) for o in outputs if o.path.startswith(inside)})

    def sweep_partial_files(self) -> tuple[str, ...]:
        """Remove what killed writers left, while holding the run's lock; returns the removed paths."""
        return () if isinstance(self.location, StoreUrl) else sweep_partial_files(self.location)

    def _locate(self, name: str) -> str:
        """The array's folder in the run."""
        parts = name.split("/")
        if not all(_COMPONENT.fullmatch(part) and part != METADATA_FILE for part in parts):
            raise ValueError(
                f"array name {name!r} must be a relative path inside the store, its parts 1-128 letters, digits or "
                f". _ = + -, not beginning with a dot or two underscores, and not {METADATA_FILE!r}"
            )
        self._store.check_key(self.location.name, name)
        return f"{self.location.name}/{name}"

    def _create_groups(self, keys: Iterable[str]) -> None:
        """Those above arrays."""
        below = {str(group): key for key in keys for group in PurePosixPath(key).parents if group.name}
        for group in sorted(below):
            try:
                found = self._store.read(f"{group}/{METADATA_FILE}")
            except FileNotFoundError:
                self._store.put(f"{group}/{METADATA_FILE}", GROUP_METADATA)
                continue
            if found != GROUP_METADATA:
                where = self.location.parent / group
                name = below[group].removeprefix(f"{self.location.name}/")
                raise ValueError(f"name {name!r} would lie inside {where}, which is not a group: choose another name")

    def _open(self, name: str) -> zarr.Array[Any]:
        from storage.zarr_array import open_array

        key, directory = self._locate(name), self.location / name

        def read(file: str) -> bytes:
            self._store.check_key(self.location.name, f"{name}/{file}")
            return self._store.read(f"{key}/{file}")

        try:
            return open_array(read(METADATA_FILE), read)
        except FileNotFoundError as error:
            raise DamagedArray(name, f"{METADATA_FILE} is missing in {directory}") from error
        except ValueError as error:
            raise DamagedArray(name, f"{error} (in {directory})") from error


def _row_bounds(name: str, shape: tuple[int, ...], rows: slice | None) -> tuple[int, int]:
    num_rows = shape[0] if shape else 1
    if rows is None:
        return 0, num_rows
    if not shape or rows.step not in (None, 1):
        raise ValueError(f"rows of {name!r} must be slice(start, stop) of an array with dimensions, got {rows}")
    for bound in (rows.start, rows.stop):
        if bound is not None and not -num_rows <= bound <= num_rows:
            raise ValueError(f"rows {rows.start}:{rows.stop} of {name!r} are outside its {num_rows} rows")
    start, stop, _ = rows.indices(num_rows)
    return start, max(start, stop)
