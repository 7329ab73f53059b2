"""Runs the full-precision model on one chosen sample and stores the recorded calls at every segment boundary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from reelquant.calibration.block_call import Constants, Recording, Streams
from storage.unit_store import UnitStore
from workers.generation import branches
from workers.hub_snapshot import model_folder
from workers.kept_pipeline import full_precision
from workers.messages import ActivationSettings, Progress, SampleUnit, UnitOutput
from workers.model_source import family_of_model
from workers.out_of_memory import GENERATION_ADVICE, SHARDING_ADVICE
from workers.process import device_name, peak_memory_bytes, prepare_process
from workers.sharded_model import release_blocks
from workers.stored_calls import StoredSteps, write_constants, write_streams
from workers.write_behind import WriteBehind


class _LastBoundary(Exception):
    """Everything that is stored has been seen; the rest of the forward pass need not run."""


class ActivationWorker:
    """Holds the full-precision model; its unit is one sample. Writes under `activations/<sample>/<branch>/` what
    `workers.stored_calls` says."""

    BESIDE_KEPT_PIPELINE = True
    MEMORY_ADVICE = SHARDING_ADVICE + GENERATION_ADVICE

    def __init__(self, settings: ActivationSettings) -> None:
        self._settings = settings
        self._device, self._dtype = prepare_process(settings.source.numerics)
        model = model_folder(settings.source.model)
        self._family = family_of_model(model)
        self._pipeline = full_precision(
            model,
            device=self._device,
            dtype=self._dtype,
            sharding=settings.sharding,
            variant=settings.source.variant,
        )

    def run(self, unit: SampleUnit, progress: Progress, store: UnitStore) -> UnitOutput:
        """One forward pass a branch, at most up to the last boundary; `write_s` of its result is the time that it waited for
        the store."""
        with WriteBehind() as writer:
            for branch in branches(self._family, self._settings.generation):
                prefix = f"activations/{unit.name}/{branch}"

                def keep(name: str, streams: Streams, prefix: str = prefix) -> None:
                    # The copy waits for the GPU, not for the store.
                    kept = {argument: stream.to(torch.bfloat16).cpu() for argument, stream in streams.items()}
                    writer.put(partial(write_streams, store, prefix, name, kept))

                constants = self._forward(unit, branch, store, keep, progress)

                def write(constants: Constants = constants, prefix: str = prefix) -> None:
                    write_constants(constants, lambda name, value: store.write(f"{prefix}/{name}", value.cpu()))

                writer.put(write)
        return UnitOutput(
            {"prompt": unit.prompt_name, "step": unit.step, "write_s": round(writer.waited_s, 3)},
            device_name(self._device),
            peak_memory_bytes(self._device),
        )

    def shadow(self, unit: SampleUnit, progress: Progress, store: UnitStore) -> None:
        """Takes part in the forward passes of a replica's unit, and keeps nothing."""
        for branch in branches(self._family, self._settings.generation):
            self._forward(unit, branch, store, lambda *_: None, progress)

    def _forward(
        self,
        unit: SampleUnit,
        branch: str,
        store: UnitStore,
        see: Callable[[str, Streams], None],
        progress: Progress,
    ) -> Constants:
        """Calls `see(name, streams)` with the streams in front of every boundary; returns what the blocks read besides."""
        settings, transformer = self._settings, getattr(self._pipeline, unit.role)
        call = StoredSteps(store, unit.prompt_name, branch, self._device).call(unit.step, self._dtype)
        recording = Recording(self._family, transformer, call, settings.boundaries)
        done, total = 0, len(settings.boundaries)

        def at_boundary(name: str, streams: Streams | None) -> None:
            nonlocal done
            if streams is not None:
                see(name, streams)
                done += 1
                progress(done, total)
            if name == recording.last:
                raise _LastBoundary

        try:
            # No inference mode: FSDP on one rank reads the versions of tensors, which it has not.
            with torch.no_grad(), recording.watching(at_boundary):
                transformer(**call)
        except _LastBoundary:
            release_blocks(transformer, settings.sharding)
        assert recording.constants is not None
        return recording.constants
