"""What a worker has of the cache while it does a unit: reads inputs and writes outputs by their logical names.

An attempt writes into a folder of its own, in a bucket into a local one that is uploaded when the unit is done. Every array and
file is synced and hashed when it is written. What an attempt that fails has written is removed; what a killed one leaves is
named by no record.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.atomic_files import create_directory, explain_write_failure, sync_file
from storage.cache import UnitRecord, entry_key
from storage.location import Location
from storage.output_file import OutputFile, describe_files
from storage.place import WriteLocally
from storage.recorded_outputs import METADATA_FILE, DamagedArray, RecordedOutputs

if TYPE_CHECKING:
    import torch

GROUP_METADATA = b'{\n  "attributes": {},\n  "zarr_format": 3,\n  "node_type": "group"\n}'
"""``zarr.json`` of a group, byte for byte what zarr writes: an attempt's folder is one, with its arrays in it."""

_COMPONENT = re.compile(r"(?!__)[A-Za-z0-9_][A-Za-z0-9._=+-]{0,127}")


@dataclass(frozen=True)
class UnitAddress:
    """Where a unit's files lie, and those that it reads; part of the message to its worker."""

    cache: Location
    run: Location
    """Where checkpoints lie."""
    stage: str
    unit: str
    fingerprint: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the units that it reads, by ``<stage>/<unit>``."""


class UnitStore(RecordedOutputs):
    """Inputs and outputs of one unit. Outputs are written inside of ``with``, once each."""

    def __init__(self, address: UnitAddress) -> None:
        super().__init__(address.cache, address.run, self._input)
        self._address = address
        self._records: dict[str, UnitRecord] = {}
        self._own = f"{address.stage}/{address.unit}/"
        self._outputs: dict[str, OutputFile] = {}
        self._open = contextlib.ExitStack()
        self.folder = Path()
        """Local folder of the attempt."""
        self.attempt: str | None = secrets.token_hex(8)
        """Of the outputs' folder; None once a checkpoint was written."""

    def __enter__(self) -> UnitStore:
        self.folder = self._open.enter_context(self.cache.place.workshop(self._key))
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        self._open.__exit__(*error)

    @property
    def outputs(self) -> tuple[OutputFile, ...]:
        """All files that were written, in order."""
        return tuple(self._outputs.values())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write ``tensor`` durably as the array ``name``, which begins with the unit's own stage and name.

        Memory beyond the tensor: a few chunks of 16 MiB; one CPU copy of a tensor that is not contiguous or not on the CPU.

        Raises:
            ValueError: NaN or infinity (how many, where the first), a dtype that cannot be stored, or a bad name.
            OSError: disk full and the like; names path and bytes.
        """
        from storage.arrays import check_storable, write_array

        try:
            check_storable(tensor)
        except ValueError as error:
            raise ValueError(f"calibration array {name!r} is not written: {error}") from error
        path = self._new(name)
        with explain_write_failure(path, tensor.nbytes):
            create_directory(path.parent)
            for group in (path.parent, *path.parent.parents):
                if group.is_relative_to(self.folder):
                    self._make_group(group / METADATA_FILE)
            write_array(path, tensor)
            self._add(path)

    def write_file(self, name: str, write: WriteLocally) -> None:
        """Have ``write`` make the file ``name``, which begins with the unit's own stage and name."""
        path = self._new(name)
        create_directory(path.parent)
        write(path)
        self._add(path)

    def write_checkpoint(self, key: str, write: WriteLocally, *, last: str) -> None:
        """Have ``write`` make the folder ``key`` of the run, in place of an older one; the file ``last`` comes last."""
        found = self.run.put_folder(key, write, last=last)
        self._outputs = {f"{key}/{output.path}": replace(output, path=f"{key}/{output.path}") for output in found}
        self.attempt = None

    def publish(self) -> tuple[OutputFile, ...]:
        """The outputs, where everybody sees them who has the record that will name them."""
        if self.attempt is None or not self._outputs:
            return self.outputs
        return self.cache.place.publish(self.folder, self._key, self.outputs)

    @property
    def _key(self) -> str:
        return f"{entry_key(self._address.stage, self._address.fingerprint)}/{self.attempt}"

    def _input(self, stage: str, unit: str) -> UnitRecord | None:
        """The record of an input; None where there is none (any more)."""
        name = f"{stage}/{unit}"
        assert name in self._address.inputs, f"{self._own} does not say that it reads {name}"
        if name not in self._records:
            record = self.cache.read(stage, self._address.inputs[name])
            if record is None:
                return None
            self._records[name] = record
        return self._records[name]

    def _located(self, name: str, *, only: str | None = None) -> tuple[Path, list[OutputFile]]:
        if not name.startswith(self._own):
            return super()._located(name, only=only)
        inside = name.removeprefix(self._own)
        outputs = [o for path, o in self._outputs.items() if path == inside or path.startswith(f"{inside}/")]
        if not outputs:
            raise DamagedArray(name, "it was not written")
        return self.folder, outputs

    def _new(self, name: str) -> Path:
        inside = name.removeprefix(self._own)
        sound = all(_COMPONENT.fullmatch(part) and part != METADATA_FILE for part in inside.split("/"))
        if not sound or inside == name:
            raise ValueError(
                f"output name {name!r} must begin with {self._own!r}, and go on with parts of 1-128 letters, digits or "
                f". _ = + -, not beginning with a dot or two underscores, and not {METADATA_FILE!r}"
            )
        path = self.folder / inside
        if path.exists() or any((above / METADATA_FILE).exists() and not _is_group(above) for above in path.parents):
            raise ValueError(f"output name {name!r} is taken, as an array, a file or a group: choose another one")
        return path

    def _make_group(self, metadata: Path) -> None:
        if not metadata.exists():
            metadata.write_bytes(GROUP_METADATA)
            self._add(metadata)

    def _add(self, path: Path) -> None:
        for written in (path, *path.rglob("*")):
            sync_file(written)
        for output in describe_files(path, base=self.folder):
            self._outputs[output.path] = output


def _is_group(folder: Path) -> bool:
    return (folder / METADATA_FILE).read_bytes() == GROUP_METADATA
