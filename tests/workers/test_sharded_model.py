"""Two processes that hold one transformer together give what one gives alone: with FSDP over gloo, bit for bit."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from tests.errors import raises
from tests.needs import need_module
from tests.unit_cache import UnitCache, ignore
from tests.workers import replica_ranks
from tests.workers.replica_ranks import GENERATION, MODEL, PROMPTS
from workers.generation import generate
from workers.process_group import join_process_group
from workers.sharded_model import offload_components
from workers.sharding import Sharding

ROOT = Path(__file__).resolve().parents[2]
NUM_RANKS = 2


def run_ranks(*arguments: str, num_ranks: int = NUM_RANKS) -> None:
    """Runs a module on so many ranks, each with a GPU where there are GPUs; the output of those that fail is the error."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, port = server.getsockname()
        place = {"WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        held = [{"MASTER_LISTEN_FD": str(server.fileno())}] + [{}] * (num_ranks - 1)
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env={**os.environ, **place, **held[rank], "RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)},
                pass_fds=[server.fileno()] if held[rank] else [],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(num_ranks)
        ]
    try:
        outputs = [rank.communicate(timeout=250)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [output[-4000:] for rank, output in zip(ranks, outputs, strict=True) if rank.returncode != 0]
    assert not failed, "\n".join(failed)


def store(run: Path) -> dict[str, bytes]:
    """All that was written."""
    results = {path.name: path.read_bytes() for path in sorted(run.glob("*.json"))}
    return {**results, **UnitCache(run).load().contents()}


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Three trajectories, the activations of three samples, a reference and a noise floor, by this process."""
    run = tmp_path_factory.mktemp("none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")
        replica_ranks.main(run, Sharding())
    return store(run)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two ranks, in a folder for each kind of sharding, which before found values, dtypes, buffers and early exits
    of a sharded transformer to be those of a whole one."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    model = WanTransformer3DModel(**sizes, freq_dim=16, ffn_dim=48, num_layers=3, cross_attn_norm=True)
    whole, lacking = folder / "whole", folder / "lacking"
    model.save_pretrained(whole, max_shard_size="50KB")
    assert len(list(whole.glob("*.safetensors"))) > 1
    variant = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(variant, whole / "diffusion_pytorch_model.fp16.safetensors")
    model.save_pretrained(lacking)
    file = lacking / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "proj_out.bias"}, file)
    save_experts(folder / "experts", model)
    kinds = [kind for kind in ("fsdp", "deepspeed") if kind == "fsdp" or find_spec(kind)]
    run_ranks("tests.workers.replica_ranks", str(folder), "all", *kinds)
    return folder


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_two_ranks_write_the_bytes_of_the_whole_model(unsharded: dict[str, bytes], sharded: Path, kind: str) -> None:
    if kind == "deepspeed":
        need_module("deepspeed", extra="tests")
    assert_same(store(sharded / kind), unsharded)


@pytest.mark.slow
def test_one_rank_writes_the_bytes_of_the_whole_model(unsharded: dict[str, bytes], tmp_path: Path) -> None:
    run_ranks("tests.workers.replica_ranks", str(tmp_path), "fsdp", num_ranks=1)
    assert_same(store(tmp_path), unsharded)


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def save_experts(folder: Path, first: WanTransformer3DModel) -> None:
    """A pipeline with a transformer for the steps above half of the noise, and another one below."""
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(MODEL / "tokenizer"),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=first,
        transformer_2=WanTransformer3DModel(**dict(first.config)),
        boundary_ratio=0.5,
    ).save_pretrained(folder)


def test_offloaded_components_change_no_value() -> None:
    pipeline = DiffusionPipeline.from_pretrained(str(MODEL), dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def video() -> torch.Tensor:
        return generate(pipeline, PROMPTS[0], GENERATION, seed=0, progress=ignore).video

    expected = video()
    offload_components(pipeline, torch.device("cpu"), but=("transformer",))
    assert all(parameter.is_meta for parameter in pipeline.text_encoder.parameters()), "brought layer by layer"
    assert isinstance(pipeline.vae, AutoencoderKLHunyuanVideo)
    for _ in range(2):
        assert torch.equal(video(), expected)


def test_a_process_without_a_place_is_told_how_to_get_one() -> None:
    with raises(RuntimeError, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        join_process_group(torch.device("cpu"))
