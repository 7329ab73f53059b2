"""What every rank finds of a sharded transformer. Started by a test on each rank, with its place in the environment, as

    python -m tests.workers.sharded_checks FOLDER

FOLDER holds `whole/` and `lacking/`, transformers of which the second lacks a tensor, and `experts/`, a pipeline with two
transformers. Ends with 0 if all is as it should be.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.errors import raises
from workers.process_group import join_process_group
from workers.sharded_model import (
    offload_components,
    open_full_precision,
    open_sharded_transformer,
    release_blocks,
)
from workers.sharding import Sharding

FSDP = Sharding("fsdp")
CPU = torch.device("cpu")


def inputs(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Other ones on every rank."""
    generator = torch.Generator().manual_seed(rank)
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([500 + rank]),
        "encoder_hidden_states": torch.randn(1, 5 + rank, 16, generator=generator).to(dtype),
    }


def assert_sharded(model: nn.Module, world_size: int) -> None:
    """Every parameter is cut, and this rank holds its part of all."""
    parameters = dict(model.named_parameters())
    whole = [name for name, parameter in parameters.items() if not isinstance(parameter, DTensor)]
    assert not whole, whole
    held = sum(p.to_local().numel() for p in parameters.values() if isinstance(p, DTensor))
    total = sum(p.numel() for p in parameters.values())
    assert held < 1.1 * total / world_size, (held, total)


@torch.no_grad()
def check_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Values, dtypes, buffers and outputs are those of the model that diffusers opens."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    expected = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).eval()
    model = open_sharded_transformer(folder, device=CPU, dtype=dtype, sharding=FSDP)
    assert_sharded(model, world_size)
    buffers = dict(expected.named_buffers())
    assert buffers, "this model is used because it has buffers that are in no file"
    for name, buffer in buffers.items():
        found = model.get_buffer(name)
        assert found.dtype == buffer.dtype, name
        assert torch.equal(found, buffer), name
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.dtype == expected.get_parameter(name).dtype, name
        assert torch.equal(parameter.full_tensor(), expected.get_parameter(name)), name
    own = inputs(rank, dtype)
    for _ in range(2):
        assert torch.equal(model(**own).sample, expected(**own).sample)
        assert_sharded(model, world_size)
    check_early_exit(model, own, world_size)
    assert torch.equal(model(**own).sample, expected(**own).sample)


def check_early_exit(model: nn.Module, own: dict[str, Tensor], world_size: int) -> None:
    """A pass that is left at a block leaves parameters gathered, until they are released."""

    def leave(*_: object) -> None:
        raise InterruptedError

    handle = model.get_submodule("blocks.1").register_forward_pre_hook(leave)
    with pytest.raises(InterruptedError):
        model(**own)
    handle.remove()
    assert not all(isinstance(parameter, DTensor) for parameter in model.parameters())
    release_blocks(model, FSDP)
    assert_sharded(model, world_size)


def check_experts(folder: Path) -> None:
    """A pipeline whose later steps have a transformer of their own: this rank holds its part of both."""
    whole, pipeline = (
        open_full_precision(folder, device=CPU, dtype=torch.float32, sharding=sharding)
        for sharding in (Sharding("none"), FSDP)
    )
    expected = video(whole)
    offload_components(pipeline, CPU, but=("transformer", "transformer_2"))
    for _ in range(2):
        assert torch.equal(video(pipeline), expected)
        for transformer in (pipeline.transformer, pipeline.transformer_2):
            assert_sharded(transformer, dist.get_world_size())


def video(pipeline: Any) -> Tensor:
    """Of four steps, of which each transformer does two; another one on every rank."""
    seen: list[nn.Module] = []
    experts = [pipeline.transformer, pipeline.transformer_2]
    handles = [expert.register_forward_pre_hook(lambda module, _: seen.append(module)) for expert in experts]
    generator = torch.Generator().manual_seed(dist.get_rank())
    result: Tensor = pipeline(
        f"the digit {dist.get_rank()}",
        max_sequence_length=16,
        height=16,
        width=16,
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="pt",
        generator=generator,
    ).frames
    for handle in handles:
        handle.remove()
    assert seen == [experts[0], experts[0], experts[1], experts[1]]
    return result


def main(folder: Path) -> None:
    """All checks."""
    join_process_group(CPU)
    torch.set_num_threads(1)
    check_dtype(folder / "whole", torch.float32)
    check_dtype(folder / "whole", torch.bfloat16)
    with raises(ValueError, folder / "lacking", "proj_out.bias"):
        open_sharded_transformer(folder / "lacking", device=CPU, dtype=torch.float32, sharding=FSDP)
    check_experts(folder / "experts")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
