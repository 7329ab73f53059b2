"""A loaded checkpoint under what users do with a transformer: offloading, compilation, copies, several requests at once."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from torch import Tensor

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.checkpoint.inference_specs import VelocityCorrection
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.checkpoint.writer import write_checkpoint
from reelquant.runtime.attach import attach_runtime
from reelquant.settings.attention import Residual
from reelquant.settings.generation import StepProtection

CPU = torch.device("cpu")
SPARSE = SparseAttentionSpec(
    density=0.6,
    online=True,
    interval=3,
    dense_above=0.9,
    residual=Residual(order=2, rank=8, extrapolation="linear"),
)
CORRECTION = VelocityCorrection((900.0, 500.0), ((1.0, 2.0, 1.0, 0.5), (2.0, 1.0, 1.0, 1.0)), ((0.0,) * 4, (1.0,) * 4))
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "protected": {"step_protection": StepProtection(0.7, 16)},
    "everything": {
        "step_protection": StepProtection(0.7, 8),
        "sparse_attention": SPARSE,
        "velocity_correction": CORRECTION,
    },
}


@pytest.fixture(scope="module", params=list(KINDS))
def checkpoint(request: pytest.FixtureRequest, tiny: Callable[[dict[str, Any]], Path]) -> Path:
    return tiny(KINDS[request.param])


@pytest.fixture(scope="module")
def tiny(
    tiny_source: Path, tiny_artifacts: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], Path]:
    def write(parts: dict[str, Any]) -> Path:
        output = tmp_path_factory.mktemp("checkpoint") / "out"
        write_checkpoint(tiny_source, output, artifacts=tiny_artifacts, bits="W4A6", method="test", **parts)
        return output

    return write


def load(checkpoint: Path) -> Any:
    return HunyuanVideoTransformer3DModel.from_pretrained(checkpoint / "transformer", torch_dtype=torch.float32)


@dataclass
class Request:
    """A generation on fixed noise: a text of its own, seven steps, one after the other."""

    seed: int
    device: str = "cpu"

    @torch.no_grad()
    def steps(self, model: Any) -> Iterator[Tensor]:
        """The latents after every step."""
        generator = torch.Generator().manual_seed(self.seed)
        latents = torch.randn(1, 4, 3, 4, 5, generator=generator).to(self.device)
        inputs = {
            "encoder_hidden_states": torch.randn(1, 7, 16, generator=generator).to(self.device),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]], device=self.device),
            "pooled_projections": torch.randn(1, 8, generator=generator).to(self.device),
            "guidance": torch.tensor([6000.0], device=self.device),
            "return_dict": False,
        }
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(7)
        for time in scheduler.timesteps:
            velocity = model(hidden_states=latents, timestep=time[None].to(self.device), **inputs)[0]
            latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
            yield latents

    def run(self, model: Any) -> Tensor:
        return list(self.steps(model))[-1]


REQUESTS = (Request(0), Request(1))


def test_requests_between_each_others_steps_come_out_as_alone(checkpoint: Path) -> None:
    model = load(checkpoint)
    alone = [request.run(model) for request in REQUESTS]
    outer, inner = REQUESTS[0].steps(model), None
    for step, latents in enumerate(outer):
        last = latents
        if step == 2:
            inner = REQUESTS[1].run(model)
    assert inner is not None
    assert torch.equal(inner, alone[1])
    assert torch.equal(last, alone[0])
    both = list(zip(*(request.steps(model) for request in REQUESTS), strict=True))[-1]
    assert all(torch.equal(found, expected) for found, expected in zip(both, alone, strict=True))


def test_requests_in_two_threads_come_out_as_alone(checkpoint: Path) -> None:
    model = load(checkpoint)
    alone, found = [request.run(model) for request in REQUESTS], dict[int, Tensor]()
    turns = threading.Barrier(2, timeout=120)

    def serve(which: int) -> None:
        for latents in REQUESTS[which].steps(model):
            found[which] = latents
            turns.wait()

    threads = [threading.Thread(target=serve, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The order in which threads share a sum is not fixed.
    assert all(torch.allclose(found[which], alone[which], rtol=1e-4, atol=1e-4) for which in range(2))


def _leaves(model: Any, **more: Any) -> None:
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level", **more)


OFFLOADS: dict[str, Callable[[Any, Path], None]] = {
    "accelerate, with buffers": lambda model, _: cpu_offload(model, CPU, offload_buffers=True) and None,
    "leaves": lambda model, _: _leaves(model),
    "leaves, to the disk": lambda model, folder: _leaves(model, offload_to_disk_path=str(folder)),
    "blocks, to the disk": lambda model, folder: model.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("offload", list(OFFLOADS))
def test_offloading_changes_nothing(checkpoint: Path, tmp_path: Path, offload: str, mode: Any) -> None:
    model = load(checkpoint)
    expected = REQUESTS[0].run(model)
    OFFLOADS[offload](model, tmp_path)
    with mode():
        # Weights read from a file are aligned otherwise, and sums of products follow.
        assert torch.allclose(REQUESTS[0].run(model), expected, rtol=1e-4, atol=1e-4)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
def test_copies_compute_the_same_and_share_nothing(checkpoint: Path, duplicate: Callable[[Any], Any]) -> None:
    model = load(checkpoint)
    expected = REQUESTS[0].run(model)
    twin = duplicate(model)
    assert torch.equal(REQUESTS[0].run(twin), expected)
    both = zip(REQUESTS[0].steps(model), REQUESTS[1].steps(twin), strict=True)
    assert torch.equal(list(both)[-1][0], expected)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.zero_()
    assert torch.equal(REQUESTS[0].run(model), expected)


@pytest.mark.parametrize(
    ("kind", "how"),
    [("dense", "whole"), ("everything", "whole"), ("protected", "repeated blocks"), ("everything", "repeated blocks")],
)
def test_compiled_it_computes_the_same(tiny: Callable[[dict[str, Any]], Path], kind: str, how: str) -> None:
    torch._dynamo.reset()
    model = load(tiny(KINDS[kind]))
    expected = REQUESTS[0].run(model)
    if how == "whole":
        model.compile(backend="aot_eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.allclose(REQUESTS[0].run(model), expected, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def test_blocks_of_a_kind_share_their_compiled_code(tiny_source: Path) -> None:
    torch._dynamo.reset()
    config = HunyuanVideoTransformer3DModel.load_config(tiny_source / "transformer")
    torch.manual_seed(0)
    model: Any = HunyuanVideoTransformer3DModel.from_config({**config, "num_layers": 4, "num_single_layers": 5}).eval()
    spec = QuantizationSpec("W4A6", "test", layers={}, sparse_attention=SPARSE, velocity_correction=CORRECTION)
    with torch.device("meta"):  # a default device is none of the blocks' numbers'
        attach_runtime(model, spec)
    expected = REQUESTS[0].run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    # One code for the first shapes, one more for a part of them that changes; never one a block.
    with torch._dynamo.config.patch(recompile_limit=2):
        assert torch.allclose(REQUESTS[0].run(model), expected, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("duplicate", [None, copy.deepcopy, _pickled])
def test_dequantized_it_is_what_it_saves(
    checkpoint: Path, tmp_path: Path, duplicate: Callable[[Any], Any] | None
) -> None:
    model = load(checkpoint)
    model = model if duplicate is None else duplicate(model)
    model.dequantize()
    model.save_pretrained(tmp_path / "transformer")
    plain = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "transformer")
    # Weights read from a file are aligned otherwise.
    assert torch.allclose(REQUESTS[0].run(model), REQUESTS[0].run(plain), rtol=1e-4, atol=1e-4)
    assert not hasattr(model, "sparse_attention")
    processors = {type(processor) for processor in model.attn_processors.values()}
    assert processors == {type(processor) for processor in plain.attn_processors.values()}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # Inductor's own: deprecations inside torch, advice on TF32
@pytest.mark.parametrize("how", ["whole", "repeated blocks"])
def test_compiled_on_a_gpu_it_computes_the_same(checkpoint: Path, how: str) -> None:
    torch._dynamo.reset()
    model = load(checkpoint).to("cuda")
    # Compiled blocks run over single operations.
    model.block_fusion.mode = "off"
    request = Request(0, "cuda")
    expected = request.run(model)
    if how == "whole":
        model.compile()
    else:
        model.compile_repeated_blocks(fullgraph=True)
    found = request.run(model)
    torch._dynamo.reset()
    assert float((found - expected).norm() / expected.norm()) < 1e-2
