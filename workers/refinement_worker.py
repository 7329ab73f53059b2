"""What can only be fitted on the whole quantized model: repair of its drift, gains and refreshes of its residual, and the
correction of its velocity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelquant.calibration.drift_repair import BlockRepair, RepairSample, repair_block
from reelquant.calibration.input_groups import block_calls
from reelquant.calibration.residual_drift import MeasuredResidual, ResidualDrift, measured_residual
from reelquant.calibration.sample import Sample
from reelquant.calibration.velocity_fit import LEAST_PROMPTS, VelocityMoments, fit_velocity
from reelquant.checkpoint.inference_specs import VelocityCorrection
from reelquant.checkpoint.layer_packing import read_block_artifact, write_block_artifact
from reelquant.checkpoint.reader import source_weights
from reelquant.checkpoint.safetensors_file import StoredTensor
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.quantization.layer_spec import LAYER_SUFFIXES, TORCH_DTYPES, layer_digest
from reelquant.runtime.pipeline_schedule import PipelineSchedule
from reelquant.settings.generation import StepProtection
from storage.unit_store import UnitStore
from workers.generation import COND, branches
from workers.hub_snapshot import model_folder
from workers.messages import Progress, PromptUnit, RefinementSettings, RefinementUnit, SampleUnit, UnitOutput
from workers.model_source import family_of_model, load_block, transformer_config
from workers.process import device_name, peak_memory_bytes, prepare_process
from workers.quantized_model import full_precision_transformer, quantized_block, quantized_transformer
from workers.residual_watch import ResidualWatch
from workers.stored_calls import StoredConstants, StoredSteps

MEASURED_PROMPTS = 2
"""First calibration prompts on whose trajectories the drift of the residual is measured."""


class RefinementWorker:
    """Its unit is one method. Writes `refinement/<unit>/<block>.safetensors` of every block that it repairs: the
    block's artifact with other scales and biases of its output layers."""

    def __init__(self, settings: RefinementSettings) -> None:
        self._settings = settings
        self._device, self._dtype = prepare_process(settings.source.numerics)
        self._model = model_folder(settings.source.model)
        self._family = family_of_model(self._model)
        self._weights: dict[str, StoredTensor] = {}
        self._steps: tuple[int, ...] | None = None
        self._config = transformer_config(self._model)
        self._calls = block_calls(self._family, self._config)
        self._branches = branches(self._family, settings.generation)

    def run(self, unit: RefinementUnit, progress: Progress, store: UnitStore) -> UnitOutput:
        """Repairs first: the residual is that of the repaired model, the velocity that of both."""
        self._store, self._steps = store, unit.steps
        self._weights = source_weights(self._model / unit.role, variant=self._settings.source.variant)
        names = tuple(self._calls) if unit.method.recipe.drift_repair else ()
        steps = self._num_steps() if unit.method.recipe.velocity_correction else 0
        measured = self._settings.prompts[:MEASURED_PROMPTS] if unit.method.recipe.attention.measures_residual else ()
        total, done = len(names) + steps + sum(len(self._served(prompt)) for prompt in measured), 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        result: dict[str, Any] = {
            "method": unit.method.name,
            "drift": {},
            "velocity_correction": None,
            "velocity": None,
        }
        paths = [store.file(name) for name in unit.artifacts]
        artifacts = {path.name.removesuffix(".safetensors"): path for path in paths}
        for name, repair in self._repairs(unit, artifacts, names):
            result["drift"][name] = {
                "without": repair.without,
                "before": repair.before,
                "after": repair.after,
                "accepted": repair.accepted,
            }
            if repair.accepted:
                artifacts[name] = self._write(unit, artifacts[name], name, repair)
            advance()
        if unit.method.recipe.attention.measures_residual:
            residual, unit = self._residual(unit, list(artifacts.values()), advance)
            result["residual"] = residual.to_dict()
        if unit.method.recipe.velocity_correction:
            result.update(self._velocity(unit, list(artifacts.values()), advance))
        return UnitOutput(result, device_name(self._device), peak_memory_bytes(self._device))

    def _repairs(
        self, unit: RefinementUnit, artifacts: Mapping[str, Path], names: tuple[str, ...]
    ) -> Iterator[tuple[str, BlockRepair]]:
        """Block by block; one block of each model is on the device at a time."""
        protection = unit.method.protection
        constants = StoredConstants(self._device)
        samples = [
            self._sample(sample, branch, names[0], protection, constants)
            for sample in (self._settings.samples if names else ())
            if sample.role == unit.role
            for branch in self._branches
        ]
        for name in names:
            reference = load_block(self._model, self._weights, name, device=self._device, dtype=self._dtype)
            quantized = quantized_block(
                self._model, self._weights, name, artifacts[name], device=self._device, dtype=self._dtype
            )
            # The quantized block's attention is dense: what runs sparse is corrected towards dense by its residual.
            dtype = self._bias_dtype(name)
            yield name, repair_block(self._calls[name], (reference, quantized), samples, bias_dtype=dtype)

    def _bias_dtype(self, block: str) -> torch.dtype | None:
        """The source's, in which a checkpoint keeps biases."""
        layers = (output.layer for level in self._calls[block].outputs for output in level)
        bias = self._weights.get(f"{block}.{next(layers)}.bias")
        return None if bias is None else TORCH_DTYPES[bias.info.dtype]

    def _sample(
        self,
        sample: SampleUnit,
        branch: str,
        entry: str,
        protection: StepProtection | None,
        constants: StoredConstants,
    ) -> RepairSample:
        prefix = f"activations/{sample.name}/{branch}"
        streams = {
            name: self._store.read(f"{prefix}/{entry}/{name}").to(self._dtype) for name in self._calls[entry].streams
        }
        timestep = float(self._store.read(f"trajectories/{sample.prompt_name}/timesteps")[sample.step])
        bits = None if protection is None else protection.bits_at(self._family.noise_level(timestep))
        return RepairSample(Sample(streams, streams, constants.read(self._store, prefix)), bits)

    def _write(self, unit: RefinementUnit, artifact: Path, name: str, repair: BlockRepair) -> Path:
        tensors, specs = read_block_artifact(artifact)
        dtype = self._bias_dtype(name)
        for inside, changed in repair.layers.items():
            layer = f"{name}.{inside}"
            tensors[f"{layer}.weight_scale"] = changed["weight_scale"].cpu()
            if "bias" in changed:
                tensors[f"{layer}.bias"] = changed["bias"].to("cpu", dtype)
            own = {s: tensors[f"{layer}.{s}"] for s in LAYER_SUFFIXES if f"{layer}.{s}" in tensors}
            specs[layer] = replace(specs[layer], digest=layer_digest(own))
        repaired = f"refinement/{unit.name}/{name}.safetensors"
        self._store.write_file(repaired, lambda path: write_block_artifact(path, tensors, specs))
        return self._store.file(repaired)

    def _residual(
        self, unit: RefinementUnit, artifacts: list[Path], advance: Callable[[], None]
    ) -> tuple[MeasuredResidual, RefinementUnit]:
        """The drift of the quantized model's residual on stored trajectories, its attention dense; and the unit with it."""
        spec, method = unit.sparse_attention, unit.method
        assert spec is not None
        protected = QuantizationSpec(bits="", method="", layers={}, step_protection=method.protection)
        model = quantized_transformer(
            self._model, self._weights, artifacts, device=self._device, dtype=self._dtype, spec=protected
        )
        prompts = self._settings.prompts[:MEASURED_PROMPTS]
        served = self._served(prompts[0])
        drift = ResidualDrift(len(served))
        for prompt in prompts:
            steps = StoredSteps(self._store, prompt.name, COND, self._device)
            watch = ResidualWatch(self._family, self._config, spec, steps.call(served[0], self._dtype))
            with watch.watching(model):
                for _ in self._velocities(model, prompt, advance, only=(COND,)):
                    pass
            watch.add_to(drift)
        levels = PipelineSchedule(self._model, self._family)(len(self._timesteps(prompts[0])))
        own, asked = [levels[step] for step in served], method.recipe.attention
        found = measured_residual(drift, spec, own, gain=asked.calibrates_gain, placed=asked.places_refreshes)
        if found.refresh_steps is not None:
            found = replace(found, refresh_steps=tuple(served[step] for step in found.refresh_steps))
        return found, replace(unit, sparse_attention=found.applied(spec))

    def _velocity(self, unit: RefinementUnit, artifacts: list[Path], advance: Callable[[], None]) -> dict[str, Any]:
        """Both models on the stored trajectories, one after the other: they need not fit on the device together.

        The full-precision velocities are computed again: in bfloat16 the stored latents are too coarse for the difference
        of two of them.
        """
        prompts, method = self._settings.prompts, unit.method
        if len(prompts) < LEAST_PROMPTS:
            said = f"not fitted: {len(prompts)} calibration prompts, {LEAST_PROMPTS} or more are needed"
            return {"velocity": {"note": said}}
        exact = full_precision_transformer(self._model, self._weights, device=self._device, dtype=self._dtype)
        references = [list(self._velocities(exact, prompt, advance)) for prompt in prompts]
        del exact
        spec = QuantizationSpec(
            bits="",
            method=method.name,
            layers={},
            sparse_attention=unit.sparse_attention,
            step_protection=method.protection,
        )
        quantized = quantized_transformer(
            self._model, self._weights, artifacts, device=self._device, dtype=self._dtype, spec=spec
        )
        # bfloat16 has steps of 4 near 1000: two steps may have one timestep, and then share their correction.
        timesteps = self._timesteps(prompts[0])
        stored = [timesteps[step] for step in self._served(prompts[0])]
        times = list(dict.fromkeys(stored))
        moments = VelocityMoments(len(prompts), len(times), len(references[0][0]))
        at = [time for time in stored for _ in self._branches]
        for index, prompt in enumerate(prompts):
            found = self._velocities(quantized, prompt, advance)
            for time, reference, velocity in zip(at, references[index], found, strict=True):
                moments.add(index, times.index(time), reference=reference, quantized=velocity)
        fit = fit_velocity(moments)
        correction = VelocityCorrection(tuple(times), _rows(fit.gain), _rows(fit.bias))
        return {
            "velocity_correction": None if fit.ridge is None else correction.to_dict(),
            "velocity": {
                "ridge": fit.ridge,
                "error_before": fit.error_before,
                "error_after": fit.error_after,
                "num_prompts": len(prompts),
            },
        }

    def _velocities(
        self, transformer: Any, prompt: PromptUnit, advance: Callable[[], None], only: Sequence[str] | None = None
    ) -> Iterator[Tensor]:
        """`[C, ...]` of every step that the transformer serves and every branch of one prompt, in order, from the stored
        latents; on the CPU.

        Args:
            only: the branches, None for all.
        """
        calls = [StoredSteps(self._store, prompt.name, branch, self._device) for branch in only or self._branches]
        for step in self._served(prompt):
            for branch in calls:
                with torch.no_grad():
                    [velocity] = transformer(**branch.call(step, self._dtype))
                yield velocity[0].movedim(self._family.channel_axis - 1, 0).cpu()
            advance()

    def _served(self, prompt: PromptUnit) -> Sequence[int]:
        """Steps of a trajectory that the unit's transformer serves."""
        return range(len(self._timesteps(prompt))) if self._steps is None else self._steps

    def _timesteps(self, prompt: PromptUnit) -> list[float]:
        values: list[float] = self._store.read(f"trajectories/{prompt.name}/timesteps").tolist()
        return values

    def _num_steps(self) -> int:
        """Forward passes of both models over all trajectories; 0 where they are too few to fit anything."""
        if len(self._settings.prompts) < LEAST_PROMPTS:
            return 0
        return 2 * sum(len(self._served(prompt)) for prompt in self._settings.prompts)


def _rows(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.float().tolist())
