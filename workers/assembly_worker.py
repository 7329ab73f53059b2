"""Puts one method's block artifacts and the source model together to a diffusers pipeline folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from reelquant.checkpoint.reader import SECOND_TRANSFORMER, TRANSFORMER
from reelquant.checkpoint.verify import VerificationReport, verify_checkpoint
from reelquant.checkpoint.writer import Calibrated, check_place, write_checkpoint
from storage.unit_store import UnitStore
from workers.hub_snapshot import model_folder
from workers.messages import AssemblySettings, AssemblyUnit, Progress, UnitOutput
from workers.process import device_name, peak_memory_bytes, prepare_process

INDEX = "model_index.json"
"""Without it a folder is no pipeline."""


class AssemblyWorker:
    """Its unit is one checkpoint."""

    def __init__(self, settings: AssemblySettings) -> None:
        self._settings = settings
        self._device, _ = prepare_process(settings.source.numerics)
        self._model = model_folder(settings.source.model)

    def run(self, unit: AssemblyUnit, progress: Progress, store: UnitStore) -> UnitOutput:
        """Writes the checkpoint, checks it as `verify` does, and puts it in its place, where an older one may be.

        Raises:
            ValueError: the checkpoint is not sound, which it would be again; its place is as it was.
        """
        run = store.run.location
        transformers = {
            role: Calibrated(
                [store.file(name) for name in found.artifacts], found.sparse_attention, found.velocity_correction
            )
            for role, found in unit.transformers.items()
        }
        reports: list[VerificationReport] = []

        def write(folder: Path) -> None:
            self._write(folder, unit, transformers)
            progress(1, 2)
            reports.append(verify_checkpoint(folder))
            if problems := reports[-1].problems:
                found = "; ".join(problems).replace(str(folder), f"{run}/{unit.checkpoint}")
                raise ValueError(f"the assembled checkpoint is not sound and was not put in its place: {found}")

        if isinstance(run, Path):
            check_place(self._model.resolve(), (run / unit.checkpoint).resolve())
        store.write_checkpoint(unit.checkpoint, write, last=INDEX)
        [report] = reports
        progress(2, 2)
        return UnitOutput(
            {
                "method": unit.method.name,
                "bits": unit.bits_label,
                "checkpoint": unit.checkpoint,
                "transformer_bytes": report.total_bytes,
                "source_bytes": report.source_bytes,
                "compression": report.compression,
            },
            device_name(self._device),
            peak_memory_bytes(self._device),
        )

    def _write(self, folder: Path, unit: AssemblyUnit, transformers: Mapping[str, Calibrated]) -> None:
        first = transformers[TRANSFORMER]
        write_checkpoint(
            self._model,
            folder,
            artifacts=first.artifacts,
            bits=unit.bits_label,
            method=unit.method.name,
            variant=self._settings.source.variant,
            calibration=dict(self._settings.calibration),
            sparse_attention=first.sparse_attention,
            step_protection=unit.method.protection,
            velocity_correction=first.velocity_correction,
            second=transformers.get(SECOND_TRANSFORMER),
            max_shard_bytes=self._settings.max_shard_bytes,
        )
