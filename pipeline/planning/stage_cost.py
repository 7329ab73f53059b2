"""Peak memory and floating-point operations of every stage, counted by running the model's code on the meta device.

Memory of a stage that generates videos (trajectories, evaluation): the whole pipeline's weights, plus the larger of one
forward pass of the transformer and decoding of one video in tiles, the VAE's weights apart; the noise floor also a forward
pass with the attention that it compares; trajectories also what the
salience hooks take: on a GPU in 16 bits `4 d^2 min(8, blocks) + 2 min(max(n d), 2^25)` bytes (Gram matrices that wait for
each other, the errors of a piece of a layer's weight), otherwise `8 L d + 20 min(max(n d), 2^23)` (a copy of a block's input,
float32 copies of a piece of a layer's weight). Activations: the weights and one forward pass. Where trajectories and
activations share the model, it takes its `gpus_per_replica`-th part of a GPU (nothing with offload) and two whole blocks, the
one that runs and the next; the text encoders take none, the VAE is there to decode.

Distillation: the segment's blocks; three streams `[L, d]` (full precision, quantized, target; two in a segment of one
block) and the rotary tables `8 L_video d_head`, of all samples on a CPU, of the one in use on a GPU (the others wait in
host memory); plus the largest, of the largest block, of one learning step (forward, loss, backward, of the tokens that a step
sees), one forward pass of all tokens without gradients, and its rounding, `8 L d_in + 16 d_in^2` bytes (weighted inputs and
Hessian, both float32).

Refinement: one block of both models and one forward pass of it, with four streams as in the distillation and five
`[L, d]` in float32 for the sums; or, for the velocity, the transformer's weights and one forward pass.

On a GPU that is what the allocator holds; the CUDA context and fragmentation come on top. On a CPU the process itself
comes on top, `PROCESS_BYTES`, and the workspaces of convolutions are not counted. Fake quantization is counted as its kernels
do it for GPUs, and as torch does it for a CPU; attention under a band by what the band visits, and at FlexAttention's rate
where that computes it.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn

from pipeline.context import RunContext
from pipeline.planning.block_cost import BlockCosts
from pipeline.planning.decoding import decode_one
from pipeline.planning.meta_run import META, MetaRun, bytes_of, run_on_meta, tensors_of, to_dtype
from pipeline.planning.model_size import component_on_meta, components
from pipeline.planning.operations import Operations
from pipeline.planning.store_size import activation_bytes, hidden_size
from pipeline.planning.token_counts import TokenCounts
from pipeline.run_units import NOISE_FLOOR, evaluated_models, num_videos, velocity_models
from reelquant.attention.head_kind import NUM_ROWS
from reelquant.calibration.spectral_norm import GRAMS_AT_ONCE, SUMMED_ROWS
from reelquant.checkpoint.pipeline_files import read_components, transformer_names
from reelquant.ops.implementation import reference_only
from workers.evaluation_worker import OTHER_ATTENTION
from workers.messages import MethodPlan
from workers.model_source import build_on_meta
from workers.refinement_worker import MEASURED_PROMPTS
from workers.salience_hooks import HALF_WEIGHT_VALUES, WEIGHT_VALUES, sampled_weight_error
from workers.step_effects import spread_steps

PROCESS_BYTES = 460 * 2**20
"""Resident memory of a worker process that has opened a pipeline of no size (measured)."""
USUAL_LANCZOS_STEPS = 32
"""Until the spectral norm of a block's input has converged (HunyuanVideo-13B with random weights)."""


@dataclass(frozen=True)
class StageCost:
    """What one stage takes."""

    peak_bytes: int
    """Of one worker."""
    operations: Operations
    """Of all units together."""


class CostModel:
    """Counts the costs of a run's stages.

    Args:
        dtype: of weights and activations.
    """

    def __init__(self, context: RunContext, counts: TokenCounts, dtype: torch.dtype) -> None:
        self._context, self._counts, self._dtype = context, counts, dtype
        self._weights = {name: self._component_bytes(name) for name in components(context.model.folder)}
        self._transformer = to_dtype(build_on_meta(context.model.config, context.model.family), dtype)
        self._weights["transformer"] = bytes_of(self._transformer)
        self._sharded_bytes = sum(
            self._weights[name] for name in transformer_names(read_components(context.model.folder))
        )
        self._forward = self._count_forward()
        self._blocks = BlockCosts(context, counts, dtype)

    def stages(self) -> dict[str, StageCost]:
        """By stage; those that take little are not there. Without a GPU there are no kernels to count."""
        with nullcontext() if self._context.config.workers.num_gpus > 0 else reference_only():
            return {
                "trajectories": self.trajectories(),
                "activations": self.activations(),
                "distillation": self.distillation(),
                "refinement": self.refinement(),
                "evaluation": self.evaluation(),
            }

    @property
    def _pipeline_bytes(self) -> int:
        return sum(self._weights.values())

    @property
    def _forward_bytes(self) -> int:
        return self._beside_weights(self._forward)

    def _beside_weights(self, run: MetaRun) -> int:
        return run.peak_bytes - self._weights["transformer"]

    @cached_property
    def _decoding(self) -> tuple[int, Operations]:
        return decode_one(self._context.model.folder, self._counts, self._dtype)

    @property
    def _replica_bytes(self) -> int:
        """What one worker holds of the full-precision pipeline in the stages that may share it."""
        workers = self._context.config.workers
        if workers.num_ranks is None:
            return self._pipeline_bytes
        on_gpu, model = workers.num_gpus > 0, self._sharded_bytes
        shard = 0 if on_gpu and workers.offload != "none" else model // workers.num_ranks
        gathered = 2 * max(bytes_of(self._blocks.block(name)) for name in self._context.model.blocks)
        return shard + min(gathered, model) + (0 if on_gpu else self._pipeline_bytes - model)

    def trajectories(self) -> StageCost:
        """One generation a prompt, with the salience hooks."""
        workers = self._context.config.workers
        steps = len(self._context.calibration_prompts) * self._context.config.generation.num_inference_steps
        vae = self._weights.get("vae", 0) if workers.num_ranks is not None and workers.num_gpus > 0 else 0
        decoding, decoded = self._decoding
        peak = max(self._forward_bytes + self._salience_bytes(), decoding + vae)
        operations = (Operations.of(self._forward) + self._salience()) * steps
        return StageCost(self._replica_bytes + peak, operations + decoded * len(self._context.calibration_prompts))

    def activations(self) -> StageCost:
        """One forward pass a sample, up to the last boundary, and its streams into the store."""
        last = self._context.model.blocks.index(self._context.segments[-1][0])
        share = last / len(self._context.model.blocks)
        operations = Operations.of(self._forward) * (share * self._context.config.selection.num_samples)
        operations += Operations(stored=activation_bytes(self._context, self._counts))
        return StageCost(self._replica_bytes + self._forward_bytes, operations)

    def evaluation(self) -> StageCost:
        """One generation a held-out prompt and model, another one for the noise floor, whose other attention keeps all its
        scores; a denoising without decoding for every teacher-forced pass, and half of one, on average, for each step that is
        perturbed. A quantized model is counted like the full-precision one."""
        decoding, decoded = self._decoding
        config, forward = self._context.config, Operations.of(self._forward)
        passes = [(self._forward, num_videos(config, model)) for model in evaluated_models(config)]
        if NOISE_FLOOR in evaluated_models(config):
            with attention_backend(OTHER_ATTENTION):
                passes.append((self._count_forward(), num_videos(config, NOISE_FLOOR)))
        steps = config.generation.num_inference_steps
        operations = sum(((Operations.of(run) * steps + decoded) * num for run, num in passes), start=Operations())
        measured, at_once = config.num_velocity_prompts, 1
        if measured:
            perturbed = spread_steps(config.num_weight_steps, steps)
            operations += forward * (steps * measured * len(velocity_models(config)))
            operations += forward * (sum(steps - step for step in perturbed) * config.evaluation.weight_prompts)
            at_once = min(config.evaluation.prompts_per_pass, max(measured, len(perturbed) + 1))
        return StageCost(
            self._pipeline_bytes + max(max(self._beside_weights(run) for run, _ in passes) * at_once, decoding),
            operations,
        )

    def distillation(self) -> StageCost:
        """All methods."""
        costs = [self._distillation(method) for method in self._context.methods]
        return StageCost(
            max(cost.peak_bytes for cost in costs), sum((cost.operations for cost in costs), start=Operations())
        )

    def _distillation(self, method: MethodPlan) -> StageCost:
        model = self._context.model
        costs = self._blocks.calibration(method)
        segments = [sum(costs[name].weight_bytes for name in segment) for segment in self._context.segments]
        samples = self._context.config.selection.num_samples if method.recipe.needs_activations else 0
        longest = max(len(segment) for segment in self._context.segments)
        stream = self._counts.longest_stream * hidden_size(self._context) * self._dtype.itemsize
        rotary = 8 * self._counts.layout.num_video * int(model.config["attention_head_dim"])
        at_once = min(samples, 1) if self._context.config.workers.num_gpus > 0 else samples
        held = at_once * ((2 if longest == 1 else 3) * stream + rotary)
        peak = max(segments) + held + max(cost.extra_bytes for cost in costs.values())
        return StageCost(peak, sum((cost.operations for cost in costs.values()), start=Operations()))

    def refinement(self) -> StageCost:
        """Drift repair: 2.75 passes of a block over all samples, and two for every level of its output layers. Velocity:
        every step of every trajectory with both models. Residual: every step of the first trajectories, and in host memory
        what all blocks miss at the sampled rows of one of them."""
        context, costs = self._context, [StageCost(0, Operations())]
        repaired = sum(method.drift_repair for method in context.methods)
        corrected = sum(method.velocity_correction for method in context.methods)
        if repaired:
            costs.append(self._drift_repair(repaired))
        measured = sum(method.measures_residual for method in context.methods)
        if measured:
            costs.append(self._residual_drift(measured))
        if corrected:
            steps = len(context.calibration_prompts) * context.config.generation.num_inference_steps
            costs.append(StageCost(self._forward.peak_bytes, Operations.of(self._forward) * (2 * steps * corrected)))
        return StageCost(
            max(cost.peak_bytes for cost in costs), sum((cost.operations for cost in costs), start=Operations())
        )

    def _residual_drift(self, num_methods: int) -> StageCost:
        context = self._context
        steps, prompts = context.config.generation.num_inference_steps, context.calibration_prompts[:MEASURED_PROMPTS]
        heads, size = context.model.family.num_heads(context.model.config)
        kept = 4 * steps * len(context.model.blocks) * heads * NUM_ROWS * size
        on_gpu = context.config.workers.num_gpus > 0
        operations = Operations.of(self._forward) * (len(prompts) * steps * num_methods)
        return StageCost(self._forward.peak_bytes + (0 if on_gpu else kept), operations)

    def _drift_repair(self, num_methods: int) -> StageCost:
        family, names = self._context.model.family, self._context.model.blocks
        num, sample = self._context.config.selection.num_samples, self._blocks.sample()
        runs: dict[Any, tuple[int, MetaRun]] = {}
        operations = Operations()
        for name in names:
            levels = family.output_layers(name)
            if levels not in runs:
                block = self._blocks.block(name)
                forward = partial(family.call_block, block, sample.quantized, sample.conditioning)
                run = run_on_meta(forward, holding=tensors_of(block))
                runs[levels] = (bytes_of(block), run)
            passes = 2.75 + 2 * len(levels)
            operations += Operations.of(runs[levels][1]) * (passes * num * num_methods)
        stream = sample.quantized.nbytes
        at_once = 1 if self._context.config.workers.num_gpus > 0 else num
        rotary = 8 * self._counts.layout.num_video * int(self._context.model.config["attention_head_dim"])
        peak = max(weights + run.peak_bytes for weights, run in runs.values())
        sums = 20 * sample.quantized.numel()
        return StageCost(peak + sums + at_once * (4 * stream + rotary), operations)

    def _count_forward(self) -> MetaRun:
        transformer: nn.Module = self._transformer
        config, text = self._context.model.config, self._context.config.generation.max_sequence_length

        def empty(*shape: int) -> Tensor:
            return torch.empty(1, *shape, dtype=self._dtype, device=META)

        def forward() -> Any:
            return transformer(
                hidden_states=empty(*self._counts.latent_shape),
                timestep=empty(),
                encoder_hidden_states=empty(text, int(config["text_embed_dim"])),
                encoder_attention_mask=empty(text),
                pooled_projections=empty(int(config["pooled_projection_dim"])),
                guidance=empty() if config.get("guidance_embeds") else None,
                return_dict=False,
            )

        return run_on_meta(forward, holding=tensors_of(transformer))

    @property
    def _on_tensor_cores(self) -> bool:
        """Whether the salience hooks multiply in 16 bits."""
        return self._context.config.workers.num_gpus > 0 and self._dtype.itemsize == 2

    def _salience_bytes(self) -> int:
        """Of the salience hooks, beside a forward pass."""
        model, d, features = self._context.model, hidden_size(self._context), self._context.config.selection.features
        largest = max(out * inputs for out, inputs in model.linears.values())
        if self._on_tensor_cores:
            norms, errors = 4 * d * d * min(GRAMS_AT_ONCE, len(model.blocks)), 2 * min(largest, HALF_WEIGHT_VALUES)
        else:
            norms, errors = 8 * self._counts.longest_stream * d, 20 * min(largest, WEIGHT_VALUES)
        return norms * ("block_input" in features) + errors * ("weight_error" in features)

    def _salience(self) -> Operations:
        """Of the salience hooks in one pass, as far as recorded: every block's spectral norm, every weight rounded and tried
        on some tokens.

        On a GPU in 16 bits a chunk of tokens reads and writes the Gram matrix, a Lanczos step reads it, and a weight is read
        and its errors are written; on it the products are in 16 bits.
        """
        model, length, d = self._context.model, self._counts.longest_stream, hidden_size(self._context)
        features, operations = self._context.config.selection.features, Operations()
        if "block_input" in features:
            passes = 2 * math.ceil(length / SUMMED_ROWS) + USUAL_LANCZOS_STEPS if self._on_tensor_cores else 0
            operations += Operations(matrix=2.0 * length * d**2, moved=4.0 * passes * d**2) * len(model.blocks)
        if "weight_error" not in features:
            return operations
        known = dict[tuple[int, int], Operations]()
        for shape in model.linears.values():
            if shape not in known:
                known[shape] = self._weight_error(*shape)
            operations += known[shape]
        return operations

    def _weight_error(self, num_outputs: int, num_inputs: int) -> Operations:
        selection = self._context.config.selection
        num_tokens = min(selection.weight_error_tokens, self._counts.longest_stream)
        if self._on_tensor_cores:
            values = num_outputs * num_inputs
            return Operations(matrix=4.0 * num_tokens * values, moved=2.0 * self._dtype.itemsize * values)
        weight = torch.empty(num_outputs, num_inputs, dtype=self._dtype, device=META)
        rows = torch.empty(num_tokens, num_inputs, dtype=self._dtype, device=META)
        bits = selection.weight_error_bits or self._context.config.bits.weight
        run = run_on_meta(partial(sampled_weight_error, rows, weight, bits))
        return Operations(float32=run.matrix_flops + run.float32_flops, moved=run.moved_bytes)

    def _component_bytes(self, name: str) -> int:
        if not (self._context.model.folder / name / "config.json").is_file():
            return 0
        built = component_on_meta(self._context.model.folder, name)
        return 0 if built is None else sum(p.numel() for p in built.parameters()) * self._dtype.itemsize
