"""A transformer sharded by DeepSpeed's ZeRO-3, its shards on the device, in host memory or on NVMe.

Built with every parameter cut as soon as it is made, then filled tensor by tensor: rank 0 reads, one tensor at a time is whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import diffusers
import torch
import torch.distributed as dist
from torch import nn

from reelquant.checkpoint.reader import source_weights
from reelquant.diffusers_internals import no_initial_weights
from workers.fsdp_model import check_tensors
from workers.model_source import build_without_weights
from workers.sharding import Sharding

# Where it finds no GPU, DeepSpeed compiles an operator for sums over the ranks of one CPU first, half a minute of every rank.
# ZeRO-3 without training never sums.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

LIVE_VALUES = 2 * 10**8
"""Parameters that may be whole at once on a rank, over those of the layer that runs: those fetched ahead."""


def open_zero3(
    folder: Path, *, device: torch.device, dtype: torch.dtype, sharding: Sharding, variant: str | None = None
) -> nn.Module:
    """The transformer in `folder` over the ranks of the process group, ready for inference; all parameters in `dtype`.

    Raises:
        ValueError: the files lack a tensor.
    """
    skeleton = build_without_weights(folder, dtype)
    weights = source_weights(folder, variant=variant)
    check_tensors(skeleton, folder, weights)
    largest = max(parameter.numel() for parameter in skeleton.parameters())
    configuration = zero3_configuration(dtype, sharding, largest=largest)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    model_configuration: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model_class = getattr(diffusers, model_configuration["_class_name"])
    with no_initial_weights(), deepspeed.zero.Init(config_dict_or_path=configuration):
        model: nn.Module = model_class.from_config(model_configuration)
    model.requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(weights[name].read())
    for name, buffer in model.named_buffers():
        known = skeleton.get_buffer(name) if name not in skeleton.state_dict() else weights[name].read()
        buffer.data = known.to(device)
    # Not the engine that is returned: what gathers the parameters are hooks on the model itself.
    deepspeed.initialize(model=model, config=configuration)
    return model


def zero3_configuration(dtype: torch.dtype, sharding: Sharding, *, largest: int) -> dict[str, Any]:
    """What DeepSpeed is told.

    Args:
        largest: values of the largest parameter; a buffer of the NVMe offload must hold one.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_max_live_parameters": LIVE_VALUES,
        "stage3_max_reuse_distance": LIVE_VALUES,
        "stage3_prefetch_bucket_size": LIVE_VALUES // 2,
        "memory_efficient_linear": False,  # saves memory in training only, and replaces torch's linear in the whole process
    }
    if sharding.offload != "none":
        zero["offload_param"] = {"device": sharding.offload, "pin_memory": torch.cuda.is_available()}
    if sharding.offload == "nvme":
        zero["offload_param"] |= {"nvme_path": str(sharding.offload_path), "buffer_size": largest + 2**20}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
