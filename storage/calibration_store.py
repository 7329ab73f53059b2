"""The calibration store: tensors by name, one Zarr v3 array each, whole or absent.

Any Zarr reader opens the arrays; ``storage.zarr_layout`` says what lies where. The bytes are written and read here
directly rather than through zarr-python: the same bytes at about twice the rate, with no copy of the tensor in memory,
synced to disk, and with a missing data file as an error (every Zarr reader takes it for zeros).

An array is written once by one writer: in a folder into a hidden directory, synced, and renamed; in a bucket as whole
objects, the metadata last. When two write one name, the last one stands, whole. A kill leaves the old array, the new one or
none; and at most a partial directory (:meth:`CalibrationStore.sweep_partial_files`). Equal tensors give equal bytes.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray

from storage.array_file import NotFinite, read_rows, write_data_file
from storage.atomic_files import sweep_partial_files
from storage.location import StoreUrl, local_path, parse_location
from storage.open_store import open_store
from storage.output_file import OutputFile
from storage.run_store import StoreUnreachable
from storage.zarr_layout import GROUP_METADATA, METADATA_FILE, ArrayLayout

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

        Memory beyond the tensor: none for a contiguous CPU tensor, else one CPU copy.

        Returns:
            The files, relative to the parent of ``root`` (the run directory), for the unit's record.

        Raises:
            ValueError: NaN or infinity (how many, where the first), a dtype that cannot be stored, or a bad name.
            OSError: disk full and the like; names path and bytes, and nothing half-written stays.
        """
        key = self._locate(name)
        layout = ArrayLayout.of(tuple(tensor.shape), tensor.dtype)
        if self._store.subfolders(key):
            raise ValueError(f"name {name!r} is a group of arrays in {self.location}: choose another name")
        self._create_groups([key])
        checksums: dict[str, str] = {}

        def write_files(folder: Path) -> None:
            checksums.update(_write_files(folder, layout, tensor))

        try:
            files = self._store.publish_array(key, write_files, num_bytes=layout.data_bytes)
        except NotFinite as error:
            raise ValueError(f"calibration array {name!r} is not written: {error}") from error
        return tuple(OutputFile(f"{key}/{file}", size, checksums[file], e_tag) for file, (size, e_tag) in files.items())

    def read(self, name: str, *, rows: slice | None = None) -> torch.Tensor:
        """Read the array ``name``, or the given rows of dimension 0, with every checksum on the way verified.

        Args:
            name: as given to :meth:`write`.
            rows: ``slice(start, stop)`` with the bounds of Python's slices, but inside the array; reads and verifies
                only the inner chunks (about 6 MiB) that it touches.

        Returns:
            A CPU tensor of the written dtype that owns its memory.

        Raises:
            DamagedArray: missing, short, corrupt, NaN or infinite; says which file and what.
            ValueError: bad name; rows with a step or outside the array.
        """
        key = self._locate(name)
        layout, directory = self._layout(name, key), self.location / name
        start, stop = _row_bounds(name, layout, rows)
        shape = (stop - start, *layout.shape[1:]) if layout.shape else ()
        out = np.empty((stop - start) * layout.row_bytes, np.uint8)
        if not out.nbytes:
            return torch.empty(shape, dtype=layout.dtype)
        try:
            with self._store.open_ranges(f"{key}/{layout.data_file}") as reader:
                read_rows(reader, layout, out, start=start, stop=stop)
        except StoreUnreachable:  # says nothing about the array
            raise
        except FileNotFoundError as error:
            raise DamagedArray(name, f"{layout.data_file} is missing in {directory}") from error
        except (ValueError, OSError) as error:
            raise DamagedArray(name, f"{error} (in {directory})") from error
        return torch.from_numpy(out).view(layout.dtype).reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the array ``name``, from its metadata alone.

        Raises:
            DamagedArray: missing, or metadata that was not written by this class.
            ValueError: bad name.
        """
        return self._layout(name, self._locate(name)).shape

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

    def _layout(self, name: str, key: str) -> ArrayLayout:
        directory = self.location / name
        try:
            raw = self._store.read(f"{key}/{METADATA_FILE}")
        except FileNotFoundError as error:
            raise DamagedArray(name, f"{METADATA_FILE} is missing in {directory}") from error
        try:
            return ArrayLayout.from_metadata(raw)
        except ValueError as error:
            raise DamagedArray(name, f"{error} ({len(raw)} bytes in {directory})") from error


def _write_files(folder: Path, layout: ArrayLayout, tensor: torch.Tensor) -> dict[str, str]:
    """Write both files in the new directory: SHA-256 of each."""
    metadata, checksums = layout.metadata(), {}
    (folder / METADATA_FILE).write_bytes(metadata)
    if layout.num_chunks:
        checksums[layout.data_file] = write_data_file(folder / layout.data_file, layout, _stored_bytes(tensor))
    return {**checksums, METADATA_FILE: hashlib.sha256(metadata).hexdigest()}


def _stored_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The tensor's bytes in C order; a view where the tensor is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _row_bounds(name: str, layout: ArrayLayout, rows: slice | None) -> tuple[int, int]:
    if rows is None:
        return 0, layout.num_rows
    if not layout.shape or rows.step not in (None, 1):
        raise ValueError(f"rows of {name!r} must be slice(start, stop) of an array with dimensions, got {rows}")
    num_rows = layout.num_rows
    for bound in (rows.start, rows.stop):
        if bound is not None and not -num_rows <= bound <= num_rows:
            raise ValueError(f"rows {rows.start}:{rows.stop} of {name!r} are outside its {num_rows} rows")
    start, stop, _ = rows.indices(num_rows)
    return start, max(start, stop)
