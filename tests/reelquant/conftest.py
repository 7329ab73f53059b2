"""A tiny HunyuanVideo pipeline folder, its layers quantized to block artifacts, and the checkpoint made of both."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from reelquant.checkpoint.layer_packing import pack_layer, write_block_artifact
from reelquant.checkpoint.writer import write_checkpoint
from reelquant.quantization.layer_spec import LayerSpec
from reelquant.quantization.rotation import block_size, hadamard, transform_weight
from reelquant.quantization.weight_grid import fit_per_channel, fit_two_level

# Every combination that the format has: transform or none, both weight layouts, activations quantized or not. 24 and 96
# inputs: no multiple of 64, and 24 = 3 blocks of 8.
TINY_GROUPS: dict[str, list[tuple[Sequence[str], int, int, str, bool]]] = {
    "transformer_blocks.0": [
        (("attn.to_q", "attn.to_k", "attn.to_v"), 4, 6, "two_level", True),
        (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), 3, 8, "per_channel", True),
        (("norm1.linear",), 8, 16, "per_channel", False),
        (("ff.net.0.proj",), 5, 4, "two_level", False),
        (("ff.net.2",), 4, 6, "two_level", True),
    ],
    "single_transformer_blocks.0": [
        (("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"), 4, 6, "per_channel", True),
        (("proj_out",), 2, 8, "two_level", True),
    ],
}


def quantize_group(
    linears: dict[str, nn.Linear], weight_bits: int, activation_bits: int, *, layout: str, transform: bool
) -> tuple[dict[str, Tensor], dict[str, LayerSpec]]:
    """Tensors and specifications of layers that share their input; the first one leads."""
    num_inputs = next(iter(linears.values())).in_features
    scale = torch.rand(num_inputs) + 0.5 if transform else None
    rotation = hadamard(block_size(num_inputs)).bfloat16() if transform else None
    tensors, specs = {}, {}
    for name, linear in linears.items():
        weight = transform_weight(linear.weight.detach().float(), scale, rotation)
        grid = (fit_two_level if layout == "two_level" else fit_per_channel)(weight, weight_bits)
        packed, specs[name] = pack_layer(
            name,
            codes=grid.round(weight),
            grid=grid,
            bias=None,
            activation_bits=activation_bits,
            group=next(iter(linears)),
            channel_scale=scale,
            rotation=rotation,
            activation_clip=torch.tensor([0.9]) if activation_bits < 16 else None,
        )
        tensors.update(packed)
    return tensors, specs


def write_artifacts(
    model: nn.Module, groups: dict[str, list[tuple[Sequence[str], int, int, str, bool]]], folder: Path
) -> list[Path]:
    """One block artifact for every block in `groups`."""
    paths = []
    for block, members in groups.items():
        tensors: dict[str, Tensor] = {}
        specs: dict[str, LayerSpec] = {}
        for names, weight_bits, activation_bits, layout, transform in members:
            full = [f"{block}.{name}" for name in names]
            linears = {name: module for name in full if isinstance(module := model.get_submodule(name), nn.Linear)}
            found = quantize_group(linears, weight_bits, activation_bits, layout=layout, transform=transform)
            tensors.update(found[0])
            specs.update(found[1])
        paths.append(folder / f"{block}.safetensors")
        write_block_artifact(paths[-1], tensors, specs)
    return paths


@pytest.fixture(scope="session")
def artifact_writer() -> Callable[..., list[Path]]:
    """`write_artifacts(model, groups, folder)`."""
    return write_artifacts


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with a bfloat16 transformer and what else a writer meets. Read only."""
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )
    # Sharded: the writer meets an index in the source.
    model.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="50KB")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("not to be copied")
    index = {
        "_class_name": "HunyuanVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def tiny_artifacts(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Block artifacts for `tiny_source`. Read only."""
    torch.manual_seed(1)
    model = HunyuanVideoTransformer3DModel.from_pretrained(tiny_source / "transformer", torch_dtype=torch.bfloat16)
    return write_artifacts(model, TINY_GROUPS, tmp_path_factory.mktemp("blocks"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_source: Path, tiny_artifacts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of both. Read only."""
    output = tmp_path_factory.mktemp("checkpoint") / "W4A6"
    write_checkpoint(
        tiny_source, output, artifacts=tiny_artifacts, bits="W4A6", method="test", calibration={"prompts": ["seven"]}
    )
    return output


@pytest.fixture
def own_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_checkpoint` that the test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "own"))
