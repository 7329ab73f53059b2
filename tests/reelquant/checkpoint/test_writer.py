import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file

from reelquant.checkpoint.layer_packing import read_block_artifact, write_block_artifact
from reelquant.checkpoint.reader import read_weights
from reelquant.checkpoint.verify import verify_checkpoint
from reelquant.checkpoint.writer import Calibrated, write_checkpoint
from tests.errors import names, raises
from tests.workers.test_component_check import edit_tensors


def write(source: Path, output: Path, artifacts: list[Path], *, max_shard_bytes: int = 10**9) -> Path:
    write_checkpoint(
        source,
        output,
        artifacts=artifacts,
        bits="W4A6",
        method="test",
        calibration={"prompts": ["seven"]},
        max_shard_bytes=max_shard_bytes,
    )
    return output


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    stored, problems = read_weights(folder / "transformer")
    assert problems == []
    return {name: tensor.read() for name, tensor in stored.items()}


def test_holds_the_sources_and_the_artifacts_tensors(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path
) -> None:
    found, source = tensors(tiny_checkpoint), tensors(tiny_source)
    packed, layers = {}, {}
    for path in tiny_artifacts:
        more = read_block_artifact(path)
        packed.update(more[0])
        layers.update(more[1])
    kept = {name: tensor for name, tensor in source.items() if name.removesuffix(".weight") not in layers}
    assert len(kept) < len(source)
    assert set(found) == set(packed) | set(kept)
    for name, tensor in {**packed, **kept}.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    config = json.loads((tiny_checkpoint / "transformer" / "config.json").read_text())
    plain = json.loads((tiny_source / "transformer" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == plain
    assert quantization["bits"] == "W4A6"
    assert quantization["calibration"] == {"prompts": ["seven"]}
    assert quantization["layers"] == {name: spec.to_dict() for name, spec in layers.items()}


def test_copies_the_rest_of_the_pipeline(tiny_source: Path, tiny_checkpoint: Path) -> None:
    assert set(files(tiny_checkpoint)) == {
        "model_index.json",
        "reelquant.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }
    name = "model_index.json"
    assert (tiny_checkpoint / name).read_bytes() == (tiny_source / name).read_bytes()


@pytest.mark.parametrize("max_shard_bytes", [1, 10_000])
def test_sharded_equals_unsharded(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path, tmp_path: Path, max_shard_bytes: int
) -> None:
    output = write(tiny_source, tmp_path / "sharded", tiny_artifacts, max_shard_bytes=max_shard_bytes)
    shards = list((output / "transformer").glob("*.safetensors"))
    assert len(shards) > 5
    expected, found = tensors(tiny_checkpoint), tensors(output)
    for shard in shards:
        loaded = load_file(shard)
        assert len(loaded) == 1 or sum(t.numel() * t.element_size() for t in loaded.values()) <= max_shard_bytes
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert verify_checkpoint(output).problems == []
    index = json.loads((output / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())


def test_two_writes_give_the_same_bytes(tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path) -> None:
    first = write(tiny_source, tmp_path / "first", tiny_artifacts, max_shard_bytes=20_000)
    second = write(tiny_source, tmp_path / "second", tiny_artifacts[::-1], max_shard_bytes=20_000)
    assert files(first) == files(second)


def test_failed_write_leaves_nothing(
    tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reelquant.checkpoint.writer.write_file", full)
    with raises(OSError, "Errno 28"):
        write(tiny_source, tmp_path / "out", tiny_artifacts)
    assert os.listdir(tmp_path) == []


def test_a_write_that_is_killed_leaves_no_pipeline(
    tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    monkeypatch.setattr("shutil.copyfile", lambda _source, target: copied.append(target.name))
    with raises(ValueError, "model_index.json"):
        write(tiny_source, tmp_path / "out", tiny_artifacts)
    assert copied[1:] == ["model_index.json"]


def test_folders_that_cannot_be_used_are_refused(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").mkdir()
    for source, output, *words in (
        (tmp_path, tmp_path / "out", tmp_path, "model_index.json"),
        (tiny_source, tiny_source, tiny_source, "source"),
        (tiny_source, tiny_source / "transformer" / "new", tiny_source / "transformer" / "new", tiny_source),
        (tiny_source, tmp_path / "precious", tmp_path / "precious"),
        (tiny_source, tiny_checkpoint, tiny_checkpoint),
        (tiny_checkpoint, tmp_path / "out", tiny_checkpoint, "quantized"),
    ):
        with raises(ValueError, *words):
            write(source, output, tiny_artifacts)
    with raises(ValueError, "max_shard_bytes", 0):
        write(tiny_source, tmp_path / "out", tiny_artifacts, max_shard_bytes=0)
    assert os.listdir(tmp_path) == ["precious"]


def test_everything_that_does_not_fit_is_named(tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    stored = tensors(source)
    for path in (source / "transformer").glob("*.safetensors*"):
        path.unlink()
    del stored["single_transformer_blocks.0.proj_mlp.weight"]
    stored["transformer_blocks.0.attn.to_q.weight"] = torch.randn(24, 32)
    stored["transformer_blocks.0.ff.net.2.weight"] = torch.randn(4)
    save_file(stored, source / "transformer" / "diffusion_pytorch_model.safetensors")
    packed, layers = read_block_artifact(tiny_artifacts[0])
    packed["transformer_blocks.0.ff.net.0.proj.bias"] = torch.randn(3)
    odd = tmp_path / "odd.safetensors"
    write_block_artifact(odd, packed, layers)
    offenders = {
        "single_transformer_blocks.0.proj_mlp": (),
        "transformer_blocks.0.attn.to_q.weight_packed": ("U8[24, 12]", "U8[24, 16]"),
        "transformer_blocks.0.attn.to_q.channel_scale": ("F32[24]", "F32[32]"),
        "transformer_blocks.0.ff.net.2": ("F32[4]",),
        "transformer_blocks.0.ff.net.0.proj.bias": ("F32[3]", "BF16[96]"),
    }
    with raises(ValueError, source, *offenders, *(shape for shapes in offenders.values() for shape in shapes)):
        write(source, tmp_path / "out", [odd, tiny_artifacts[1]])
    with raises(ValueError, *(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k")), tiny_artifacts[0]):
        write(tiny_source, tmp_path / "out", [*tiny_artifacts, tiny_artifacts[0]])
    with raises(ValueError, tiny_source, "layer"):
        write(tiny_source, tmp_path / "out", [])
    with raises(ValueError, "one.safetensors", "two.safetensors"):
        write(tiny_source, tmp_path / "out", [tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_artifacts_bias_replaces_the_sources(tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path) -> None:
    packed, layers = read_block_artifact(tiny_artifacts[0])
    bias = torch.randn(96)
    packed["transformer_blocks.0.ff.net.0.proj.bias"] = bias
    write_block_artifact(tmp_path / "odd.safetensors", packed, layers)
    output = write(tiny_source, tmp_path / "out", [tmp_path / "odd.safetensors", tiny_artifacts[1]])
    assert torch.equal(tensors(output)["transformer_blocks.0.ff.net.0.proj.bias"], bias)
    assert verify_checkpoint(output).problems == []


def test_takes_what_loaders_read_and_nothing_else(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    shutil.move(source / "scheduler", tmp_path / "shared")
    (source / "scheduler").symlink_to("../shared")
    (tmp_path / "shared" / "again").symlink_to(tmp_path / "shared")  # a loop
    save_file({"x": torch.ones(1)}, source / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    for stray in ("README.md", "demo.mp4", "transformer/original.pt", "transformer/notes.json", "scheduler/old.bin"):
        (source / stray).write_text("stray")
    output = write(source, tmp_path / "out", tiny_artifacts)
    assert files(output) == files(tiny_checkpoint)
    assert not (output / "scheduler").is_symlink()


def test_tensors_that_a_sources_index_does_not_name_are_no_part_of_it(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    shards = sorted((source / "transformer").glob("*.safetensors"))
    first, second = (load_file(shard) for shard in shards[:2])
    first["stray"] = torch.ones(3)
    first[next(iter(second))] = torch.ones(5)  # the index has it in the other one
    save_file(first, shards[0], metadata={"format": "pt"})
    output = write(source, tmp_path / "out", tiny_artifacts)
    assert files(output) == files(tiny_checkpoint)


def test_a_variant_becomes_a_plain_checkpoint(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Sharded and in one file; the other components' variants too."""
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    model = HunyuanVideoTransformer3DModel.from_pretrained(tiny_source / "transformer", torch_dtype=torch.bfloat16)
    shutil.rmtree(source / "transformer")
    model.save_pretrained(source / "transformer", variant="bf16", max_shard_size="50KB")
    model.save_pretrained(source / "second", variant="bf16", max_shard_size="50KB")
    index = json.loads((source / "model_index.json").read_text())
    index["second"] = index["transformer"]
    (source / "model_index.json").write_text(json.dumps(index))
    with raises(ValueError, source / "transformer", "model_variant", "bf16"):
        write(source, tmp_path / "out", tiny_artifacts)
    output = tmp_path / "out"
    write_checkpoint(source, output, artifacts=tiny_artifacts, bits="W4A6", method="test", variant="bf16")
    assert not [name for name in files(output) if "bf16" in name]
    assert verify_checkpoint(output).problems == []
    expected = tensors(tiny_checkpoint)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(output).items())
    again = HunyuanVideoTransformer3DModel.from_pretrained(output / "second", torch_dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_a_source_that_lacks_components_is_refused_with_all_of_them(
    tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    (source / "scheduler" / "scheduler_config.json").unlink()
    index = json.loads((source / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKLHunyuanVideo"]
    (source / "model_index.json").write_text(json.dumps(index))
    with raises(ValueError, "scheduler_config.json", "vae/"):
        write(source, tmp_path / "out", tiny_artifacts)
    assert not (tmp_path / "out").exists()


def test_a_second_transformer_is_not_passed_over(tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    shutil.copytree(source / "transformer", source / "transformer_2")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, "transformer_2": index["transformer"]}))
    with raises(ValueError, "transformer_2", 16):
        write_checkpoint(source, tmp_path / "output", artifacts=tiny_artifacts, bits="W4A8", method="x")
    assert not (tmp_path / "output").exists()


def test_two_transformers_are_written_and_verified_each(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source, output = Path(shutil.copytree(tiny_source, tmp_path / "source")), tmp_path / "output"
    shutil.copytree(source / "transformer", source / "transformer_2")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, "transformer_2": index["transformer"]}))
    second = Calibrated(tiny_artifacts[:1])
    write_checkpoint(source, output, artifacts=tiny_artifacts, bits="W4A6", method="test", second=second)
    one, report = verify_checkpoint(tiny_checkpoint), verify_checkpoint(output)
    assert report.problems == []
    both = [name for name in report.layers if not name.startswith("transformer_2.")]
    others = [name.removeprefix("transformer_2.") for name in report.layers if name.startswith("transformer_2.")]
    assert both == list(one.layers)
    assert 0 < len(others) < len(both)
    assert set(others) <= set(both)
    assert report.source_bytes == 2 * one.source_bytes
    assert one.total_bytes < report.total_bytes < 2 * one.source_bytes
    layer = others[0]
    weights = next(
        path
        for path in sorted((output / "transformer_2").glob("*.safetensors"))
        if f"{layer}.weight_scale" in load_file(path)
    )
    edit_tensors(weights, lambda tensors: tensors[f"{layer}.weight_scale"].fill_(torch.nan))
    assert names("\n".join(verify_checkpoint(output).problems), "transformer_2", layer)
    shutil.rmtree(output / "transformer_2")
    assert names("\n".join(verify_checkpoint(output).problems), output / "transformer_2")
    with raises(ValueError, tiny_source / "transformer_2"):
        write_checkpoint(
            tiny_source, tmp_path / "other", artifacts=tiny_artifacts, bits="W4A6", method="test", second=second
        )


def test_unusable_source_weights_are_refused(tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    shards = sorted((source / "transformer").glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-3])
    shards[1].unlink()
    with raises(ValueError, source, *shards[:2]):
        write(source, tmp_path / "out", tiny_artifacts)
    for path in (source / "transformer").glob("*.safetensors*"):
        path.unlink()
    with raises(ValueError, source / "transformer", "diffusion_pytorch_model.safetensors"):
        write(source, tmp_path / "out", tiny_artifacts)
