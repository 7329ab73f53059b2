"""The calibration store: tensors by name, one Zarr v3 array each, whole or absent.

Any Zarr reader opens the arrays; ``storage.zarr_layout`` says what lies where. The bytes are written and read here
directly rather than through zarr-python: the same bytes at about twice the rate, with no copy of the tensor in memory,
synced to disk, and with a missing data file as an error (every Zarr reader takes it for zeros).

An array is written once by one writer into a hidden directory, synced, and renamed. When two write one name, the last
one stands, whole. A kill leaves the old array, the new one or none; and at most a partial directory
(:meth:`CalibrationStore.sweep_partial_files`). Equal tensors give equal bytes.
"""

import errno
import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from storage.array_file import NotFinite, read_rows, write_data_file
from storage.atomic_files import (
    create_directory,
    explain_write_failure,
    partial_path,
    sweep_partial_files,
    sync_directory,
    sync_file,
    write_bytes_atomic,
)
from storage.manifest import OutputFile
from storage.zarr_layout import GROUP_METADATA, METADATA_FILE, ArrayLayout

_COMPONENT = re.compile(r"(?!__)[A-Za-z0-9_][A-Za-z0-9._=+-]{0,127}")
_PUBLISH_ATTEMPTS = 100


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
        root: the store's directory, inside the run directory; created by the first write.

    Names are relative POSIX paths (``activations/segment-03/sample-0007``) of letters, digits and ``. _ = + -``.
    Dtypes: bool, uint8, int8-int64, float16, bfloat16, float32, float64; any shape, scalars included.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def write(self, name: str, tensor: torch.Tensor) -> tuple[OutputFile, ...]:
        """Write ``tensor`` durably as the array ``name``; replaces an older one.

        Memory beyond the tensor: none for a contiguous CPU tensor, else one CPU copy.

        Returns:
            The files, relative to the parent of ``root`` (the run directory), for the unit's record.

        Raises:
            ValueError: NaN or infinity (how many, where the first), a dtype that cannot be stored, or a bad name.
            OSError: disk full and the like; names path and bytes, and nothing half-written stays.
        """
        target = self._locate(name)
        layout = ArrayLayout.of(tuple(tensor.shape), tensor.dtype)
        if target.is_dir() and any(entry.is_dir() for entry in target.iterdir()):
            raise ValueError(f"name {name!r} is a group of arrays in {self.root}: choose another name")
        with explain_write_failure(target, layout.data_bytes):
            self._create_groups(target.parent, name)
            partial = partial_path(target)
            try:
                files = self._write_files(partial, layout, tensor)
                _publish(partial, target)
            except NotFinite as error:
                raise ValueError(f"calibration array {name!r} is not written: {error}") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        folder = f"{self.root.name}/{name}"
        return tuple(OutputFile(f"{folder}/{file}", num_bytes, checksum) for file, num_bytes, checksum in files)

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
        directory = self._locate(name)
        layout = self._layout(name, directory)
        start, stop = _row_bounds(name, layout, rows)
        shape = (stop - start, *layout.shape[1:]) if layout.shape else ()
        out = np.empty((stop - start) * layout.row_bytes, np.uint8)
        if not out.nbytes:
            return torch.empty(shape, dtype=layout.dtype)
        try:
            read_rows(directory / layout.data_file, layout, out, start=start, stop=stop)
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

    def sweep_partial_files(self) -> tuple[str, ...]:
        """Remove what killed writers left, while holding the run's lock; returns the removed paths."""
        return sweep_partial_files(self.root)

    def _locate(self, name: str) -> Path:
        parts = name.split("/")
        if not all(_COMPONENT.fullmatch(part) and part != METADATA_FILE for part in parts):
            raise ValueError(
                f"array name {name!r} must be a relative path inside the store, its parts 1-128 letters, digits or "
                f". _ = + -, not beginning with a dot or two underscores, and not {METADATA_FILE!r}"
            )
        path = self.root.joinpath(*parts)
        expected = self.root.resolve().joinpath(*parts)
        if path.resolve() != expected:
            raise ValueError(f"array name {name!r} leads through a symbolic link to {path.resolve()}: remove the link")
        return path

    def _create_groups(self, folder: Path, name: str) -> None:
        create_directory(folder)
        inner = folder.relative_to(self.root)
        for group in (self.root, *(self.root / parent for parent in (inner, *inner.parents) if parent.parts)):
            metadata = group / METADATA_FILE
            if not metadata.exists():
                write_bytes_atomic(metadata, GROUP_METADATA)
            elif metadata.read_bytes() != GROUP_METADATA:
                raise ValueError(f"name {name!r} would lie inside {group}, which is not a group: choose another name")

    @staticmethod
    def _write_files(partial: Path, layout: ArrayLayout, tensor: torch.Tensor) -> list[tuple[str, int, str]]:
        """Write and sync both files in the new directory ``partial``: (file, bytes, SHA-256) of each."""
        partial.mkdir()
        metadata, files = layout.metadata(), []
        (partial / METADATA_FILE).write_bytes(metadata)
        if layout.num_chunks:
            checksum = write_data_file(partial / layout.data_file, layout, _stored_bytes(tensor))
            files.append((layout.data_file, layout.data_bytes, checksum))
        sync_file(partial / METADATA_FILE)
        sync_directory(partial)
        return [*files, (METADATA_FILE, len(metadata), hashlib.sha256(metadata).hexdigest())]

    def _layout(self, name: str, directory: Path) -> ArrayLayout:
        try:
            raw = (directory / METADATA_FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedArray(name, f"{METADATA_FILE} is missing in {directory}") from error
        try:
            return ArrayLayout.from_metadata(raw)
        except ValueError as error:
            raise DamagedArray(name, f"{error} ({len(raw)} bytes in {directory})") from error


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


def _publish(partial: Path, target: Path) -> None:
    """Rename the finished directory to its name; an older one is moved aside first and removed."""
    for _ in range(_PUBLISH_ATTEMPTS):
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            sync_directory(target.parent)
            return
        aside = partial_path(target)
        try:
            target.rename(aside)
        except FileNotFoundError:
            continue
        shutil.rmtree(aside)
    raise OSError(errno.EBUSY, "other writers keep replacing the array", str(target))
