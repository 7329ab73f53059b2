"""A transformer sharded by FSDP2: every parameter is cut along its first axis, a rank reads its own part from the files.

Built without weights, cut as accelerate's plugin says, given memory for its shards, loaded in place by
torch.distributed.checkpoint: a rank's memory is its shards and, while the model runs, one gathered block and the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import FSDPModule, fully_shard

from reelquant.checkpoint.reader import source_weights
from reelquant.checkpoint.safetensors_file import StoredTensor
from reelquant.diffusers_internals import unsplit_classes
from workers.model_source import build_without_weights


def open_fsdp(
    folder: Path, *, device: torch.device, dtype: torch.dtype, offload: bool, variant: str | None = None
) -> nn.Module:
    """The transformer in `folder` over the ranks of the process group, ready for inference.

    Args:
        dtype: of the parameters, whatever the files hold.
        offload: keep the shards in host memory and bring every block to the GPU when it runs.
        variant: of the weight files.

    Raises:
        ValueError: the files lack a tensor or hold one of another shape.
    """
    offload = offload and device.type == "cuda"
    model = build_without_weights(folder, dtype)
    weights = source_weights(folder, variant=variant)
    check_tensors(model, folder, weights)
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    wrap(model, offload=offload)
    model.to_empty(device="cpu" if offload else device)
    # `to_empty` has emptied them too, and those that are not persistent are in no file.
    for name, buffer in buffers.items():
        _set_buffer(model, name, buffer.to(device))
    load(model.state_dict(), storage_reader=_reader(folder, weights))
    return model


def wrap(model: nn.Module, *, offload: bool) -> None:
    """Cuts `model` in place into one unit for each block, as its class names them, and one for the rest.

    Accelerate's plugin says which modules are blocks and how they are held. `Accelerator.prepare` would cut them too, but
    has FSDP on GPUs alone, wants an optimizer, and is global to the process.
    """
    classes = {type(module).__name__ for module in model.modules()}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(classes & unsplit_classes(model)),
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        cpu_offload=offload,
    )
    plugin.set_auto_wrap_policy(model)
    is_block: Any = plugin.auto_wrap_policy
    blocks = [module for module in model.modules() if is_block(module=module, recurse=False, nonwrapped_numel=0)]
    for module in (*reversed(blocks), model):  # what is inside another comes before it
        # After the root's forward pass too: left to itself, FSDP expects a backward pass and keeps it whole.
        fully_shard(module, reshard_after_forward=True, offload_policy=plugin.cpu_offload)


def reshard(model: nn.Module) -> None:
    """Frees all gathered parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_tensors(model: nn.Module, folder: Path, weights: Mapping[str, StoredTensor]) -> None:
    """Whether the weights in `folder` are all that `model` needs.

    Raises:
        ValueError: names everything that is missing.
    """
    missing = sorted(model.state_dict().keys() - weights.keys())
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise ValueError(f"{folder} lacks the tensors {shown}: it is not whole, or of another configuration")


class _ListedFiles(FileSystem):
    """Shows the files that make up the model, not the variants that may lie beside them."""

    def __init__(self, files: list[Path]) -> None:
        self._files = [str(path) for path in files]

    def ls(self, path: Any) -> list[str]:
        return self._files


def _reader(folder: Path, weights: Mapping[str, StoredTensor]) -> HuggingFaceStorageReader:
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs = _ListedFiles(sorted({tensor.path for tensor in weights.values()}))
    return reader


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    owner.register_buffer(leaf, value, persistent=leaf not in owner._non_persistent_buffers_set)
