"""Distillation of one block at a size where memory counts, in processes that may have no more than they are given."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel

from reelquant.settings.generation import LayerBits, Numerics
from reelquant.settings.recipe import PRESETS
from storage.unit_store import UnitStore
from tests.reelquant.narrow_blocks import constants_of, layout_of, streams_of
from tests.unit_cache import UnitCache
from tests.workers.memory_limit import LIMITS, limit_memory
from workers.distillation_worker import DistillationWorker
from workers.hub_snapshot import model_folder
from workers.messages import (
    DistillationSettings,
    MethodPlan,
    Progress,
    PromptUnit,
    RunSource,
    SampleUnit,
    SegmentUnit,
    UnitOutput,
)
from workers.model_source import family_of_model, linear_shapes, transformer_config
from workers.shared_worker import SharedUnit
from workers.stored_calls import write_constants

BLOCKS = ("transformer_blocks.0", "single_transformer_blocks.0")
LATENTS = (8, 9, 32, 32) if not torch.cuda.is_available() else (8, 9, 64, 64)
"""2,304 video tokens; four times as many on a GPU, whose allocator takes memory in larger pieces."""
NUM_TEXT = 16
NUM_TOKENS = LATENTS[1] * (LATENTS[2] // 2) * (LATENTS[3] // 2) + NUM_TEXT
PROMPT = PromptUnit("prompt-000", "the digit 3 moving left")
SAMPLE = SampleUnit("prompt-000-step-000", "prompt-000", 0)


class LimitedDistillation(DistillationWorker):
    """A worker whose allocations fail for real: the system, or CUDA's allocator, refuses them.

    A segment that `LIMITS` names may have so much more than its process has when blocks and samples are loaded. The limit
    stands until the next segment.
    """

    def run(self, unit: SegmentUnit, progress: Progress, store: UnitStore) -> UnitOutput:
        self._more_mib = json.loads(os.environ.get(LIMITS, "{}")).get(unit.name)
        limit_memory(None)
        return super().run(unit, progress, store)

    def _read_ahead(self) -> None:
        super()._read_ahead()
        self._entries.stop()  # its thread has a stack
        limit_memory(self._more_mib)


def make_run(folder: Path, digits_model: Path) -> tuple[DistillationSettings, UnitCache]:
    """A run that has what distillation reads: a model of two blocks, random streams of `NUM_TOKENS` tokens."""
    model = folder / "model"
    (model / "transformer").mkdir(parents=True)
    shutil.copy(digits_model / "model_index.json", model)
    changed = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    torch.manual_seed(0)
    built = HunyuanVideoTransformer3DModel.from_config({**transformer_config(digits_model), **changed})
    built.to(torch.bfloat16).save_pretrained(model / "transformer")
    family, config = family_of_model(model), transformer_config(model)
    heads, size = family.num_heads(config)
    cache = UnitCache(folder / "run")
    generator = torch.Generator().manual_seed(0)
    layout = layout_of(config, LATENTS, NUM_TEXT)
    trajectory = {"conditioning": torch.randn(1, heads * size, generator=generator)}
    temb = torch.randn(1, heads * size, generator=generator)
    arrays: dict[str, torch.Tensor] = {}
    write_constants(constants_of(config, layout, temb), lambda name, value: arrays.__setitem__(f"cond/{name}", value))
    for block in BLOCKS:
        stream = torch.randn(NUM_TOKENS, heads * size, generator=generator).to(torch.bfloat16)
        arrays.update({f"cond/{block}/{name}": value for name, value in streams_of(stream, layout).items()})
    cache.write("trajectories", PROMPT.name, trajectory)
    cache.write("activations", SAMPLE.name, arrays)
    source = RunSource(model, 0, Numerics("float32", 1, deterministic=True))
    return DistillationSettings(source, (SAMPLE,), (PROMPT,), False), cache


def shared_unit(settings: DistillationSettings, cache: UnitCache, name: str, block: str) -> SharedUnit:
    """One block as a segment of its own."""
    model = model_folder(settings.source.model)
    family, config = family_of_model(model), transformer_config(model)
    recipe = replace(PRESETS["s2q"], rotation_block=64, epochs=2)
    bits = {
        name: LayerBits(4, 16 if name.rpartition(".")[2] == "linear" else 6)
        for name in linear_shapes(config, family)
        if name.startswith(BLOCKS)
    }
    segment = SegmentUnit(name, MethodPlan(recipe, bits), (block,))
    address = cache.address("distillation", name)
    return SharedUnit(LimitedDistillation, settings, segment, address, f"distillation/{name}", 700 * 2**20)
