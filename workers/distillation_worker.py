"""Calibrates one segment of one method: reads its entry activations, loads only its blocks, writes their integers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from reelquant.calibration.block_rounding import RoundedLayer
from reelquant.calibration.calibrated_layers import best_clip
from reelquant.calibration.input_groups import block_calls
from reelquant.calibration.sample import Sample
from reelquant.calibration.segment_distillation import DistilledBlock, distill_segment
from reelquant.checkpoint.layer_packing import pack_layer, write_block_artifact
from reelquant.checkpoint.reader import source_weights
from reelquant.checkpoint.safetensors_file import StoredTensor
from reelquant.quantization.layer_spec import LayerSpec
from reelquant.quantization.weight_grid import fit_per_channel, fit_two_level
from reelquant.settings.generation import LayerBits
from storage.unit_store import UnitStore
from workers.hub_snapshot import model_folder
from workers.messages import DistillationSettings, MethodPlan, Progress, SegmentUnit, UnitOutput
from workers.model_source import family_of_model, load_block, load_tensors, transformer_config
from workers.process import deterministic_kernels, device_name, peak_memory_bytes, prepare_process, unit_seed
from workers.read_ahead import ReadAhead
from workers.stored_calls import StoredConstants


class DistillationWorker:
    """Holds no model; its unit is one segment of one method. Writes `distillation/<unit>/<block>.safetensors`."""

    MEMORY_ADVICE: ClassVar[str] = (
        "one worker a GPU (workers.num_gpus: 1); a GPU with more memory; fewer blocks at once "
        "(distillation.segment_length: 1), on a CPU also fewer samples (selection.num_samples); steps that see a part of the "
        "tokens (method.tokens_per_step: 0.5), or a method that learns nothing (method.preset: gptq); a smaller video "
        "(generation.height, generation.width, generation.num_frames). What depends on a changed field is made anew"
    )

    def __init__(self, settings: DistillationSettings) -> None:
        self._settings = settings
        self._device, self._dtype = prepare_process(settings.source.numerics)
        self._model = model_folder(settings.source.model)
        self._family = family_of_model(self._model)
        self._calls = block_calls(self._family, transformer_config(self._model))
        self._opened: dict[str, dict[str, StoredTensor]] = {}
        self._entries = ReadAhead()
        self._ahead: tuple[UnitStore, tuple[str, ...]] | None = None
        self._constants = StoredConstants(self._device)
        self._lean = False
        self._read_s = 0.0

    def save_memory(self) -> None:
        """Learns with less memory from now on (`reelquant.calibration.saved_tensors`), and reads nothing ahead."""
        self._lean = True

    def prepare(self, unit: SegmentUnit, store: UnitStore) -> None:
        """Has the entry activations of the segment read while the next one is calibrated."""
        self._ahead = store, self._entry_names(unit)

    def run(self, unit: SegmentUnit, progress: Progress, store: UnitStore) -> UnitOutput:
        """Calibrates and writes the segment's blocks, or rounds the linears outside the blocks if it has none.

        `read_s` of its result is the time that it waited for entry activations."""
        self._entries.stop()
        self._read_s = 0.0
        if self._device.type == "cuda":
            # Blocks of another kind have tensors of other sizes: pieces of the last ones would lie idle, 7 of 25 GiB (480p).
            torch.cuda.empty_cache()
        try:
            with deterministic_kernels(asked=self._settings.source.numerics.deterministic):
                return self._do(unit, progress, store)
        except BaseException:
            self._entries.stop()  # reading would outlive this worker, and hold memory
            raise

    def _do(self, unit: SegmentUnit, progress: Progress, store: UnitStore) -> UnitOutput:
        result: dict[str, Any] = {"method": unit.method.name, "role": unit.role, "blocks": {}}
        if unit.blocks:
            for distilled in self._distill(unit, progress, store):
                _write(store, f"distillation/{unit.name}/{distilled.name}", distilled.name, distilled.layers)
                result["blocks"][distilled.name] = block_summary(distilled)
        else:
            self._read_ahead()
            _write(store, f"distillation/{unit.name}/auxiliary", "", self._auxiliary_layers(unit))
        result["read_s"] = round(self._read_s, 3)
        return UnitOutput(result, device_name(self._device), peak_memory_bytes(self._device))

    def _distill(self, unit: SegmentUnit, progress: Progress, store: UnitStore) -> Any:
        method, source, weights = unit.method, self._settings.source, self._weights(unit.role)
        blocks = {
            name: load_block(self._model, weights, name, device=self._device, dtype=self._dtype) for name in unit.blocks
        }
        bits = {name: bits_inside(method, name) for name in blocks}
        samples = [self._sample(prefix, unit, store) for prefix in self._prefixes(unit)]
        self._read_ahead()
        return distill_segment(
            self._calls,
            blocks,
            samples,
            bits=bits,
            recipe=method.recipe,
            dense_blocks=method.attention.dense_blocks,
            conditioning_rows=self._conditioning_rows(unit, store),
            seed_of=lambda block: unit_seed(source.seed, "distillation", block),
            fall_back=self._settings.fall_back,
            progress=progress,
            lean=self._lean,
        )

    def _read_ahead(self) -> None:
        """After the unit's own arrays, with which it would compete."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or self._lean:
            self._entries.forget()
        else:
            self._entries.begin(*ahead)

    def _entry_names(self, unit: SegmentUnit) -> tuple[str, ...]:
        """Arrays of the streams in front of the segment."""
        return tuple(
            f"{prefix}/{unit.entry or unit.blocks[0]}/{stream}"
            for prefix in self._prefixes(unit)
            for stream in self._calls[unit.blocks[0]].streams
        )

    def _prefixes(self, unit: SegmentUnit) -> tuple[str, ...]:
        """Of the samples' arrays, a branch at a time; none if the unit's method reads none."""
        if not unit.blocks or not unit.method.recipe.needs_activations:
            return ()
        return tuple(
            f"activations/{sample.name}/{branch}"
            for sample in self._settings.samples
            if sample.role == unit.role
            for branch in self._settings.branches
        )

    def _weights(self, role: str) -> dict[str, StoredTensor]:
        """Stored tensors of the transformer `role`; its headers are read once."""
        if role not in self._opened:
            self._opened[role] = source_weights(self._model / role, variant=self._settings.source.variant)
        return self._opened[role]

    def _sample(self, prefix: str, unit: SegmentUnit, store: UnitStore) -> Sample:
        began = time.perf_counter()
        streams = {
            name: self._entries.take(store, f"{prefix}/{unit.entry or unit.blocks[0]}/{name}").to(self._dtype)
            for name in self._calls[unit.blocks[0]].streams
        }
        self._read_s += time.perf_counter() - began
        return Sample(streams, streams, self._constants.read(store, prefix))

    def _conditioning_rows(self, unit: SegmentUnit, store: UnitStore) -> Tensor:
        """What the modulation layers read at all candidates; none where there are no such layers."""
        levels = (level for block in unit.blocks for level in self._calls[block].levels)
        if not any(group.stream == "conditioning" for level in levels for group in level):
            return torch.empty(0, 0, device=self._device)
        rows = [store.read(f"trajectories/{prompt.name}/conditioning") for prompt in self._settings.prompts]
        return torch.cat(rows).to(self._device, self._dtype)

    def _auxiliary_layers(self, unit: SegmentUnit) -> dict[str, RoundedLayer]:
        layers: dict[str, RoundedLayer] = {}
        method, weights = unit.method, self._weights(unit.role)
        for name, bits in method.bits.items():
            if self._family.auxiliary_kind(name) is None:
                continue
            tensors = load_tensors(weights, name)
            weight = tensors["weight"].to(self._device).float()
            layout = method.recipe.weight_layout
            clip = best_clip(weight, bits.weight, layout) if method.recipe.clip == "learned" else 1.0
            grid = (fit_two_level if layout == "two_level" else fit_per_channel)(weight, bits.weight, clip)
            layers[name] = RoundedLayer(
                grid.round(weight), grid, tensors.get("bias"), bits.weight, bits.activation, layout, name,
                activation_clip=torch.ones(1) if bits.activation < 16 else None,
            )  # fmt: skip
        return layers


def block_summary(distilled: DistilledBlock) -> dict[str, Any]:
    """What the report shows of a block."""
    result = distilled.result
    return {
        "losses": result.losses,
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        "layer_sqnr_db": result.layer_sqnr_db,
        "fell_back": result.fell_back,
        "attention_losses": result.attention_losses,
        "head_kinds": result.head_kinds,
        "band_errors": result.band_errors,
    }


def bits_inside(method: MethodPlan, block: str) -> dict[str, LayerBits]:
    """Bits of the layers of `block`, by name inside it."""
    prefix = f"{block}."
    return {name.removeprefix(prefix): bits for name, bits in method.bits.items() if name.startswith(prefix)}


def _write(store: UnitStore, artifact: str, prefix: str, layers: Mapping[str, RoundedLayer]) -> None:
    tensors: dict[str, Tensor] = {}
    specs: dict[str, LayerSpec] = {}
    for name, layer in layers.items():
        full, leader = _full(prefix, name), layers[layer.leader]
        packed, spec = pack_layer(
            full,
            codes=layer.codes,
            grid=layer.grid,
            bias=None,
            activation_bits=layer.activation_bits,
            group=_full(prefix, layer.leader),
            group_has_channel_scale=leader.channel_scale is not None,
            group_rotation=0 if leader.rotation is None else len(leader.rotation),
            channel_scale=layer.channel_scale,
            rotation=layer.rotation,
            activation_clip=layer.activation_clip,
        )
        tensors.update({key: value.cpu().contiguous() for key, value in packed.items()})
        specs[full] = spec
    store.write_file(f"{artifact}.safetensors", lambda path: write_block_artifact(path, tensors, specs))


def _full(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
