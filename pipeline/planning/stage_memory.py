"""Peak memory of one worker in every stage, by running the workers' own code on the meta device (`planning.meta_run`).

| stage | runs | beside the pipeline's weights, or what is said |
|---|---|---|
| trajectories | a forward pass with the salience hooks; decoding | the larger of both |
| activations | a forward pass | |
| distillation | `distill_segment` | the segment's blocks alone (`planning.block_memory`) |
| refinement | `repair_block`; a forward pass for velocity or residual | two blocks, or the transformer alone |
| evaluation | forward passes of the prompts of one call, also with the noise floor's attention; decoding | the largest |

Bounds that are not run: of a video that a VAE decodes in tiles, its first tile and twice the whole; of the quantized models of
the evaluation, full precision's. Where trajectories and activations share the model, it takes its `gpus_per_replica`-th part of
a GPU (nothing with offload) and two whole blocks, the one that runs and the next; the text encoders take none, the VAE is there
to decode.

On a GPU that is what the allocator holds; the CUDA context and fragmentation come on top. On a CPU the process itself comes on
top, `PROCESS_BYTES`, and the workspaces of convolutions are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn

from pipeline.context import RunContext
from pipeline.planning.block_memory import BlockMemory
from pipeline.planning.meta_run import bytes_of, peak_on_meta, tensors_of, to_dtype
from pipeline.planning.model_size import components
from pipeline.planning.planned_calls import planned_arguments
from pipeline.planning.token_counts import TokenCounts
from pipeline.run_units import NOISE_FLOOR, evaluated_models
from reelquant.attention.head_kind import NUM_ROWS
from reelquant.calibration.without_values import META
from reelquant.checkpoint.pipeline_files import read_components, transformer_names
from reelquant.ops.implementation import reference_only
from workers.evaluation_worker import OTHER_ATTENTION
from workers.model_source import build_on_meta, compression, empty_component
from workers.salience_hooks import SalienceHooks
from workers.step_effects import spread_steps

PROCESS_BYTES = 460 * 2**20
"""Resident memory of a worker process that has opened a pipeline of no size (measured)."""


_NOTHING_TO_MEMORY = frozenset({"run", "model", "model_revision", "model_commit", "model_variant", "seed", "prompts"})
"""Of a configuration, beside what `stage_peaks` looks at itself."""
_counted: dict[tuple[object, ...], dict[str, int]] = {}


def stage_peaks(context: RunContext, counts: TokenCounts, dtype: torch.dtype) -> dict[str, int]:
    """`StageMemory.peaks`, counted once a process for runs that differ in nothing of it, as a study's seeds."""
    folder = context.model.folder
    configs = [folder / "model_index.json", *sorted(folder.glob("*/config.json"))]
    key = (
        context.config.model_dump_json(exclude=set(_NOTHING_TO_MEMORY)),
        *(path.read_bytes() for path in configs),
        *(counts.latent_shape, counts.video_shape, counts.layout, tuple(counts.calls.values())),
        *(len(context.calibration_prompts), dtype),
    )
    if key not in _counted:
        _counted[key] = StageMemory(context, counts, dtype).peaks()
    return _counted[key]


class StageMemory:
    """Counts the peaks of a run's stages.

    Args:
        dtype: of weights and activations.
    """

    def __init__(self, context: RunContext, counts: TokenCounts, dtype: torch.dtype) -> None:
        self._context, self._counts, self._dtype = context, counts, dtype
        self._on_gpu = context.config.workers.num_gpus > 0
        self._weights = {name: self._component_bytes(name) for name in components(context.model.folder)}
        self._transformer = to_dtype(build_on_meta(context.model.config, context.model.family), dtype)
        self._weights["transformer"] = bytes_of(self._transformer)
        self._blocks = BlockMemory(context, counts, dtype)

    def peaks(self) -> dict[str, int]:
        """Bytes by stage; those that take little are not there. Without a GPU there are no kernels to count."""
        with nullcontext() if self._on_gpu else reference_only():
            forward, decoding = self._forward(), self._decoding()
            peaks = {
                "trajectories": self._replica_bytes + max(self._with_hooks(forward), self._decoding_replica(decoding)),
                "activations": self._replica_bytes + forward,
                "distillation": max(map(self._blocks.distillation, self._context.methods)),
                "refinement": self._refinement(forward),
                "evaluation": self._pipeline_bytes + max(self._evaluated(forward), decoding),
            }
        process = 0 if self._on_gpu else PROCESS_BYTES
        return {stage: peak + process for stage, peak in peaks.items()}

    @property
    def _pipeline_bytes(self) -> int:
        return sum(self._weights.values())

    @property
    def _replica_bytes(self) -> int:
        """What one worker holds of the full-precision pipeline in the stages that may share it."""
        workers = self._context.config.workers
        if workers.num_ranks is None:
            return self._pipeline_bytes
        model = sum(self._weights[name] for name in transformer_names(read_components(self._context.model.folder)))
        shard = 0 if self._on_gpu and workers.offload != "none" else model // workers.num_ranks
        gathered = min(2 * self._blocks.largest_block, model)
        return shard + gathered + (0 if self._on_gpu else self._pipeline_bytes - model)

    def _decoding_replica(self, decoding: int) -> int:
        shared = self._context.config.workers.num_ranks is not None and self._on_gpu
        return decoding + (self._weights.get("vae", 0) if shared else 0)

    def _with_hooks(self, forward: int) -> int:
        """Of a forward pass with the salience hooks."""
        selection = self._context.config.selection
        if not {"block_input", "weight_error"} & set(selection.features):
            return forward
        hooks = SalienceHooks(
            self._context.model.family,
            [self._transformer],
            weight_bits=selection.weight_error_bits or self._context.config.bits.weight,
            max_tokens=selection.weight_error_tokens,
            features=selection.features,
        )
        with hooks.watching():
            return self._forward(begin=lambda call: hooks.begin(call, conditional=True))

    def _evaluated(self, forward: int) -> int:
        """The largest of the evaluation's forward passes."""
        config, at_once = self._context.config, 1
        if measured := config.num_velocity_prompts:
            steps = spread_steps(config.num_weight_steps, config.generation.num_inference_steps)
            at_once = min(config.evaluation.prompts_per_pass, max(measured, len(steps) + 1))
        largest = forward if at_once == 1 else self._forward(at_once)
        if NOISE_FLOOR not in evaluated_models(config):
            return largest
        with attention_backend(OTHER_ATTENTION):
            return max(largest, self._forward(min(at_once, max(1, measured))))

    def _refinement(self, forward: int) -> int:
        """The largest of what the methods ask for; the residual keeps what all blocks miss at the sampled rows of one
        trajectory in host memory."""
        context, peaks = self._context, [0]
        for method in context.methods:
            if method.recipe.drift_repair:
                peaks.append(self._blocks.drift_repair(method))
            if method.recipe.velocity_correction or method.recipe.attention.measures_residual:
                peaks.append(self._weights["transformer"] + forward)
            if method.recipe.attention.measures_residual and not self._on_gpu:
                heads, size = context.model.family.num_heads(context.model.config)
                blocks, steps = len(context.model.blocks), context.config.generation.num_inference_steps
                peaks[-1] += 4 * steps * blocks * heads * NUM_ROWS * size
        return max(peaks)

    def _forward(self, batch: int = 1, begin: Callable[[dict[str, Any]], None] | None = None) -> int:
        """Of one forward pass of the transformer, beside its weights; `begin` is called in front of it."""
        batched = self._context.model.family.guidance == "batched" and len(self._context.branches) == 2
        call = self._arguments(2 * batch if batched else batch)

        def forward() -> None:
            with torch.no_grad():
                if begin is not None:
                    begin(call)
                self._transformer(**call)

        return self._beside_weights(forward, self._transformer, call.values())

    def _arguments(self, batch: int) -> dict[str, Any]:
        return planned_arguments(self._context, replace(self._counts.size, batch=batch), self._dtype)

    def _decoding(self) -> int:
        """Of decoding one video, beside the VAE's weights: its first tile, and twice the video, in tiles and put together, if
        there are others."""
        built = empty_component(self._context.model.folder, "vae")
        if built is None:
            return 0
        vae, size = cast(Any, to_dtype(built, self._dtype)), self._counts.size
        model = self._context.model
        whole = (model.family.latent_channels(model.config), size.frames, size.height, size.width)
        tile = tuple(map(min, whole, (whole[0], *_tile_shape(vae, *compression(self._context.model.folder)))))
        latents = torch.empty(1, *tile, dtype=self._dtype, device=META)

        def decode() -> None:
            with torch.no_grad():
                vae.decode(latents, return_dict=False)

        video = 2 * math.prod(self._counts.video_shape) * self._dtype.itemsize if tile != whole else 0
        return self._beside_weights(decode, vae) + video

    def _beside_weights(self, work: Any, module: nn.Module, given: Iterable[Any] = ()) -> int:
        held = [*tensors_of(module), *(value for value in given if isinstance(value, Tensor))]
        return peak_on_meta(work, holding=held, on_gpu=self._on_gpu) - bytes_of(module)

    def _component_bytes(self, name: str) -> int:
        if not (self._context.model.folder / name / "config.json").is_file():
            return 0
        built = empty_component(self._context.model.folder, name)
        return 0 if built is None else sum(p.numel() for p in built.parameters()) * self._dtype.itemsize


def _tile_shape(vae: Any, temporal: int, spatial: int) -> tuple[int, int, int]:
    """Latents `(F, H, W)` that a VAE decodes at once when it tiles: a first tile of time has one frame more than later ones."""
    return (
        getattr(vae, "tile_sample_min_num_frames", 1 << 30) // temporal + 1,
        vae.tile_sample_min_height // spatial,
        vae.tile_sample_min_width // spatial,
    )
