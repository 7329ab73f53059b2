"""Gives a loaded transformer what its checkpoint says besides the weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.diffusers_internals import not_at_end_of_call
from reelquant.families.attention_core import set_attention_core
from reelquant.families.family import family_of_architecture
from reelquant.noise_schedule import Schedule, shifted_levels
from reelquant.runtime.block_fusion import fuse_blocks, unfuse_blocks
from reelquant.runtime.generation import GenerationTracker
from reelquant.runtime.sparse_attention import BlockAttention, SparseAttention
from reelquant.runtime.step_protection import ProtectedSteps, protect_steps
from reelquant.runtime.velocity_correction import correct_velocity


def attach_runtime(
    transformer: nn.Module, spec: QuantizationSpec, *, schedule: Schedule = shifted_levels, stored: Any = None
) -> GenerationTracker | None:
    """Installs sparse attention, protected steps and the velocity correction of `spec`, as far as it has them, and the
    fused blocks of a quantized transformer whose family has them.

    `transformer.sparse_attention` is then the `SparseAttention`; `transformer.sparse_attention.enabled = False` turns it
    dense, its `configure` changes settings. `transformer.step_protection` is the `ProtectedSteps`, `transformer.block_fusion`
    the `BlockFusion`.

    Args:
        schedule: noise levels of a generation by its number of steps, for settings that count steps.
        stored: what is saved of the transformer; its `spec` follows the settings.

    Returns: what tells generations apart, None where nothing needs it.
    Raises: ValueError: no family knows the architecture, or blocks and heads of the model are not those of `spec`.
    """
    architecture = type(transformer).__name__
    if spec.layers:
        fuse_blocks(transformer, architecture)
    if spec.sparse_attention is None and spec.step_protection is None and spec.velocity_correction is None:
        return None
    family = family_of_architecture(architecture)
    config = dict(transformer.config)  # type: ignore[arg-type]
    tracker = GenerationTracker(family.noise_level, partial(family.grid, config))
    hooks, protection = [tracker.begin_passes(transformer)], None
    if spec.step_protection is not None:
        protection = ProtectedSteps(spec.step_protection, stored)
        transformer.step_protection = protection  # type: ignore[assignment]
        hooks += protect_steps(transformer, protection)
    if spec.velocity_correction is not None:
        hooks.append(correct_velocity(transformer, spec.velocity_correction, channel_axis=family.channel_axis))
    if spec.sparse_attention is not None:
        sparse = SparseAttention(
            spec.sparse_attention,
            architecture=architecture,
            config=config,
            schedule=schedule,
            num_steps=spec.num_steps,
            tracker=tracker,
            protection=protection,
            stored=stored,
        )
        sparse.check_model()
        for name in family.block_names(config):
            set_attention_core(family, transformer.get_submodule(name), BlockAttention(sparse, name))
        transformer.sparse_attention = sparse  # type: ignore[assignment]
    hooks.append(tracker.end_passes(transformer))
    transformer.runtime_hooks = tuple(hooks)  # type: ignore[assignment]
    return tracker


def detach_runtime(transformer: nn.Module) -> None:
    """Takes away what `attach_runtime` gave: what is left computes what diffusers' own class does with its weights."""
    unfuse_blocks(transformer)
    hooks: Sequence[RemovableHandle] = transformer.__dict__.pop("runtime_hooks", ())
    for hook in hooks:
        hook.remove()
    not_at_end_of_call(transformer)
    transformer.__dict__.pop("step_protection", None)
    if transformer.__dict__.pop("sparse_attention", None) is not None:
        family = family_of_architecture(type(transformer).__name__)
        for name in family.block_names(dict(transformer.config)):  # type: ignore[arg-type]
            set_attention_core(family, transformer.get_submodule(name), None)
