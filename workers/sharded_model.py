"""Opens the full-precision pipeline, whole on one device or with its transformers sharded over the ranks of a replica.

| `Sharding.sharding` | the transformers, one or two | its other components |
|---|---|---|
| `none` | whole, on the device | on the device |
| `fsdp` | `workers.fsdp_model`: PyTorch's FSDP2, as accelerate's plugin says | whole on every rank |
| `deepspeed` | `workers.zero3_model`: ZeRO-3; shards on the device, in host memory or on NVMe | whole on every rank |

Every rank runs its own batch, and gathers one block at a time from all. So all ranks must run the same number of forward
passes, and leave a pass early at the same block. The other components come to a GPU only when they are needed.

Hooks: weights are whole in the forward pre-hook of the layer that owns them, and nowhere else under both ways.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelquant.checkpoint.pipeline_files import read_components, transformer_names
from workers.model_source import open_pipeline, read_pipeline
from workers.process_group import join_process_group
from workers.sharding import Sharding


def open_full_precision(
    folder: Path, *, device: torch.device, dtype: torch.dtype, sharding: Sharding, variant: str | None = None
) -> Any:
    """The pipeline in `folder`, silent. With sharding, all ranks open it at once, and none ever holds a whole transformer.

    Raises:
        ValueError: a transformer's files lack a tensor or hold one of another shape.
    """
    if sharding.sharding == "none":
        return open_pipeline(folder, device=device, dtype=dtype, variant=variant)
    device = join_process_group(device)
    transformers = {
        name: open_sharded_transformer(folder / name, device=device, dtype=dtype, sharding=sharding, variant=variant)
        for name in transformer_names(read_components(folder))
    }
    pipeline = read_pipeline(folder, dtype=dtype, variant=variant, **transformers)
    if device.type == "cuda":
        offload_components(pipeline, device, but=transformers)
    return pipeline


def open_sharded_transformer(
    folder: Path, *, device: torch.device, dtype: torch.dtype, sharding: Sharding, variant: str | None = None
) -> nn.Module:
    """The transformer in `folder`, its weights read by every rank or, with DeepSpeed, tensor by tensor by rank 0."""
    if sharding.sharding == "deepspeed":
        from workers.zero3_model import open_zero3

        return open_zero3(folder, device=device, dtype=dtype, sharding=sharding, variant=variant)
    from workers.fsdp_model import open_fsdp

    return open_fsdp(folder, device=device, dtype=dtype, offload=sharding.offload == "cpu", variant=variant)


def release_blocks(transformer: nn.Module, sharding: Sharding) -> None:
    """Frees what a forward pass that was left early has gathered; the next pass would too, but may be long in coming."""
    if sharding.sharding == "fsdp":
        from workers.fsdp_model import reshard

        reshard(transformer)


def offload_components(pipeline: Any, device: torch.device, *, but: Collection[str]) -> None:
    """Keeps all of a pipeline but its transformers, the components named in `but`, in host memory.

    Text encoders are used once a prompt and may be larger than a shard: they run layer by layer, so that none of them is ever
    whole on the device. A VAE decodes tile by tile: it comes as a whole, and leaves before the next denoising step.
    """
    from accelerate import cpu_offload, cpu_offload_with_hook

    for name, component in pipeline.components.items():
        if not isinstance(component, nn.Module) or name in but:
            continue
        if name.startswith("text_encoder"):
            cpu_offload(component, device)
        else:
            _, hook = cpu_offload_with_hook(component, device)
            for transformer in but:
                getattr(pipeline, transformer).register_forward_pre_hook(lambda *_, hook=hook: hook.offload())
