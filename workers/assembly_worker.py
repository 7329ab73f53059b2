"""Puts one method's block artifacts and the source model together to a diffusers pipeline folder."""

from __future__ import annotations

from reelquant.checkpoint.verify import verify_checkpoint
from reelquant.checkpoint.writer import write_checkpoint
from storage.manifest import OutputFile
from storage.run_directory import RunDirectory
from workers.messages import AssemblySettings, AssemblyUnit, Progress, UnitOutput
from workers.process import device_name, peak_memory_bytes, prepare_process


class AssemblyWorker:
    """Its unit is one checkpoint."""

    def __init__(self, settings: AssemblySettings) -> None:
        self._settings = settings
        self._device, _ = prepare_process(settings.source.numerics)
        self._run = RunDirectory(settings.source.run)

    def run(self, unit: AssemblyUnit, progress: Progress) -> UnitOutput:
        """Writes the checkpoint, then checks it as `verify` does."""
        output = self._run.path / unit.checkpoint
        write_checkpoint(
            self._settings.source.model,
            output,
            artifacts=[self._run.path / artifact for artifact in unit.artifacts],
            bits=unit.bits_label,
            method=unit.method.name,
            calibration=dict(self._settings.calibration),
            sparse_attention=unit.sparse_attention,
            step_protection=unit.method.inference.protection,
            velocity_correction=unit.velocity_correction,
            max_shard_bytes=self._settings.max_shard_bytes,
        )
        progress(1, 2)
        report = verify_checkpoint(output)
        if report.problems:
            raise RuntimeError(f"the assembled checkpoint {output} is not sound: {'; '.join(report.problems)}")
        progress(2, 2)
        files = sorted(path for path in output.rglob("*") if path.is_file())
        return UnitOutput(
            tuple(OutputFile.describe(path, run=self._run.path) for path in files),
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
