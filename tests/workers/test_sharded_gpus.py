"""The same on two GPUs, over NCCL: salience and activations of a shared model are those of the whole one."""

from pathlib import Path

import pytest
import torch

from tests.needs import need_module
from tests.unit_cache import UnitCache
from tests.workers.replica_ranks import BOUNDARIES, PROMPTS, SAMPLES
from tests.workers.test_sharded_model import run_ranks, store

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by one process on one GPU."""
    run = tmp_path_factory.mktemp("none")
    run_ranks("tests.workers.replica_ranks", str(run), "none", num_ranks=1)
    return run


@pytest.mark.parametrize(
    ("kind", "offload"),
    [("fsdp", "none"), ("fsdp", "cpu"), ("deepspeed", "none"), ("deepspeed", "cpu")],
)
def test_a_shared_model_gives_the_results_of_the_whole_one(
    kind: str, offload: str, unsharded: Path, tmp_path: Path
) -> None:
    if kind == "deepspeed":
        need_module("deepspeed", extra="tests")
    run_ranks("tests.workers.replica_ranks", str(tmp_path), kind, offload)
    assert store(tmp_path).keys() == store(unsharded).keys()
    found, expected = (UnitCache(run).load().outputs for run in (tmp_path, unsharded))
    names = [f"trajectories/{prompt.name}" for prompt in PROMPTS]
    for name in [f"{stem}/{feature}" for stem in names for feature in ("latent", "block_input", "weight_error")]:
        torch.testing.assert_close(found.read(name), expected.read(name), rtol=1e-3, atol=0, msg=name)
    arrays = [
        f"activations/{sample.name}/cond/{block}/{stream}"
        for sample in SAMPLES
        for block in BOUNDARIES
        for stream in ("hidden_states", "encoder_hidden_states")
    ]
    for name in [*arrays, *(f"{stem}/latents" for stem in names)]:
        first, second = found.read(name).float(), expected.read(name).float()
        assert (first - second).norm() <= 1e-2 * second.norm(), name
