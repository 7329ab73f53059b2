import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelquant.checkpoint.file_digests import DIGESTS_NAME
from reelquant.checkpoint.verify import verify_checkpoint
from reelquant.quantization.layer_spec import LayerSpec, layer_digest
from tests.errors import names

BLOCK = "transformer_blocks.0"
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def edit_tensors(checkpoint: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Also takes the digests of files away: every other check has to find what it is for."""
    (checkpoint / DIGESTS_NAME).unlink(missing_ok=True)
    tensors = {name: tensor.clone() for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def edit_config(checkpoint: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    (checkpoint / DIGESTS_NAME).unlink(missing_ok=True)
    path = checkpoint / "transformer" / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def test_sound_checkpoint(tiny_checkpoint: Path) -> None:
    report = verify_checkpoint(tiny_checkpoint)
    assert report.problems == []
    assert report.ok
    assert report.bits == "W4A6"
    tensors = load_file(tiny_checkpoint / WEIGHTS)
    assert report.total_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert len(report.layers) == 14
    # 96 outputs, 24 inputs of 5 bits, a float32 and a uint8 scale each, and the leader's clip and the bfloat16 bias.
    layer = report.layers[f"{BLOCK}.ff.net.0.proj"]
    assert (layer.weight_bits, layer.activation_bits, layer.num_weights) == (5, 4, 96 * 24)
    assert layer.stored_bytes == 96 * (24 * 5 // 8 + 4 + 1 + 2) + 4
    assert layer.bits_per_weight == pytest.approx(8 * layer.stored_bytes / (96 * 24))


def test_source_bytes_are_those_of_16_bit_tensors(tiny_source: Path, tiny_checkpoint: Path) -> None:
    report = verify_checkpoint(tiny_checkpoint)
    source = [load_file(path) for path in (tiny_source / "transformer").glob("*.safetensors")]
    numbers = sum(tensor.numel() for shard in source for tensor in shard.values())
    assert report.source_bytes == 2 * numbers
    assert report.compression == pytest.approx(2 * numbers / report.total_bytes)


def test_names_every_tensor_that_is_missing_extra_or_wrong(own_checkpoint: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{BLOCK}.attn.to_q.rotation"]
        del tensors["x_embedder.proj.bias"]
        tensors[f"{BLOCK}.attn.to_k.rotation"] = torch.ones(8, 8)
        tensors["unknown.weight"] = torch.ones(2)
        tensors[f"{BLOCK}.attn.to_v.weight_packed"] = tensors[f"{BLOCK}.attn.to_v.weight_packed"][:, 1:].contiguous()
        tensors[f"{BLOCK}.ff.net.2.weight_scale"] = tensors[f"{BLOCK}.ff.net.2.weight_scale"].bfloat16()
        tensors["proj_out.bias"] = torch.ones(4, dtype=torch.int32)
        plain = f"{BLOCK}.norm1.linear"
        del tensors[f"{plain}.weight_packed"]
        tensors[f"{plain}.weight"] = torch.ones(144, 24)

    edit_tensors(own_checkpoint, damage)
    report = verify_checkpoint(own_checkpoint)
    assert not report.ok
    assert sorted(report.problems) == sorted(
        [
            f"layer {BLOCK}.norm1.linear: is declared as quantized, but {BLOCK}.norm1.linear.weight is stored, "
            "not quantized",
            f"tensor {BLOCK}.attn.to_k.rotation: is not a part of the model",
            f"tensor {BLOCK}.attn.to_q.rotation: is missing",
            f"tensor {BLOCK}.attn.to_v.weight_packed: has the shape [24, 11], not [24, 12]",
            f"tensor {BLOCK}.ff.net.2.weight_scale: has the dtype BF16, not F32",
            f"tensor {BLOCK}.norm1.linear.weight: is not a part of the model",
            f"tensor {BLOCK}.norm1.linear.weight_packed: is missing",
            "tensor proj_out.bias: has the dtype I32, which is not floating",
            "tensor unknown.weight: is not a part of the model",
            "tensor x_embedder.proj.bias: is missing",
        ]
    )


def test_finds_changed_and_impossible_numbers(own_checkpoint: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{BLOCK}.attn.to_q.weight_packed"][3, 4] ^= 1
        tensors[f"{BLOCK}.attn.to_k.weight_scale"][2] = torch.nan
        tensors[f"{BLOCK}.attn.to_k.bias"][:2] = torch.inf
        tensors["single_transformer_blocks.0.proj_mlp.activation_clip"][0] = -1
        tensors["proj_out.weight"][0, 0] = torch.nan

    edit_tensors(own_checkpoint, damage)
    offenders = {problem.partition(": ")[0]: problem for problem in verify_checkpoint(own_checkpoint).problems}
    for layer in (f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.to_k", "single_transformer_blocks.0.proj_mlp"):
        assert names(offenders[f"layer {layer}"], "digest")
    assert names(offenders[f"tensor {BLOCK}.attn.to_k.weight_scale"], 1)
    assert names(offenders[f"tensor {BLOCK}.attn.to_k.bias"], 2)
    assert names(offenders["tensor single_transformer_blocks.0.proj_mlp.activation_clip"], 1)
    assert names(offenders["tensor proj_out.weight"], 1)


def test_finds_codes_and_group_scales_beyond_the_grid_though_the_digest_is_right(own_checkpoint: Path) -> None:
    name = f"{BLOCK}.attn.to_v"
    config = json.loads((own_checkpoint / "transformer" / "config.json").read_text())
    spec = LayerSpec.from_dict(config["quantization_config"]["layers"][name])
    packed = torch.full((24, 12), 0x88, dtype=torch.uint8)
    scale, group_scale = torch.ones(24), torch.full((24, 1), 19, dtype=torch.uint8)
    edit_tensors(
        own_checkpoint,
        lambda tensors: tensors.update(
            {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale, f"{name}.group_scale": group_scale}
        ),
    )
    digest = layer_digest({"weight_packed": packed, "weight_scale": scale, "group_scale": group_scale})
    assert digest != spec.digest
    edit_config(own_checkpoint, lambda c: c["quantization_config"]["layers"][name].update(digest=digest))
    codes, scales = verify_checkpoint(own_checkpoint).problems
    assert names(codes, f"layer {name}", 7)
    assert names(scales, f"layer {name}", 18)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c["quantization_config"].update(format_version=99), ("format_version", 99)),
        (lambda c: c.pop("quantization_config"), ("quantization_config",)),
        (lambda c: c.update(_class_name="NoSuchModel"), ("NoSuchModel",)),
        (
            lambda c: c["quantization_config"]["layers"].update(
                {"gone.q": {**c["quantization_config"]["layers"][f"{BLOCK}.norm1.linear"], "group": "gone.q"}}
            ),
            ("gone.q", "HunyuanVideoTransformer3DModel"),
        ),
    ],
)
def test_reports_a_description_that_cannot_be_used(
    own_checkpoint: Path, edit: Callable[[dict[str, Any]], Any], words: tuple[object, ...]
) -> None:
    edit_config(own_checkpoint, edit)
    [problem] = verify_checkpoint(own_checkpoint).problems
    assert names(problem, *words)


def test_reports_damaged_files(own_checkpoint: Path, tmp_path: Path) -> None:
    path = own_checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    (own_checkpoint / DIGESTS_NAME).unlink()
    [problem] = verify_checkpoint(own_checkpoint).problems
    assert names(problem, path, path.stat().st_size), "and not each of its tensors"
    path.unlink()
    assert names(verify_checkpoint(own_checkpoint).problems[0], path.name)
    nothing = tmp_path / "nothing"
    assert names(verify_checkpoint(nothing).problems[0], nothing / "transformer" / "config.json")


def test_reports_an_index_that_does_not_fit_its_files(own_checkpoint: Path) -> None:
    folder = own_checkpoint / "transformer"
    (own_checkpoint / DIGESTS_NAME).unlink()
    (own_checkpoint / WEIGHTS).rename(folder / "a.safetensors")
    stored = sorted(load_file(folder / "a.safetensors"))
    index = {
        "weight_map": {**dict.fromkeys(stored[1:], "a.safetensors"), "ghost": "a.safetensors", "far": "b.safetensors"}
    }
    save_file({"stray": torch.ones(1)}, folder / "c.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    wrong = [("ghost", "a.safetensors"), (stored[0], "a.safetensors"), ("b.safetensors",), ("c.safetensors",)]
    for problem, words in zip(verify_checkpoint(own_checkpoint).problems, wrong, strict=True):
        assert names(problem, *words)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    assert names(verify_checkpoint(own_checkpoint).problems[0], "diffusion_pytorch_model.safetensors.index.json")


def test_every_file_of_every_component_has_a_digest(own_checkpoint: Path) -> None:
    report = verify_checkpoint(own_checkpoint)
    listed = json.loads((own_checkpoint / DIGESTS_NAME).read_text())
    there = {str(path.relative_to(own_checkpoint)) for path in own_checkpoint.rglob("*") if path.is_file()}
    assert set(listed["files"]) == there - {DIGESTS_NAME}
    assert (report.problems, report.num_files, report.not_covered) == ([], len(listed["files"]), ())


def test_files_that_are_missing_changed_or_too_many(own_checkpoint: Path) -> None:
    scheduler = own_checkpoint / "scheduler"
    (scheduler / "scheduler_config.json").write_text('{"shift": 3.0}\n')
    (scheduler / "more.json").write_text("{}")
    (own_checkpoint / "transformer" / "pytorch_model.bin").write_text("x")
    (own_checkpoint / "README.md").write_text("a model card is nobody's concern")
    (scheduler / ".hidden").write_text("nor is this")
    changed, *more = verify_checkpoint(own_checkpoint).problems
    assert names(changed, "scheduler/scheduler_config.json", "changed")
    for problem, file in zip(more, ("scheduler/more.json", "transformer/pytorch_model.bin"), strict=True):
        assert names(problem, file)
    (scheduler / "scheduler_config.json").unlink()
    (own_checkpoint / "model_index.json").unlink()
    problems = "\n".join(verify_checkpoint(own_checkpoint).problems)
    assert names(problems, "scheduler/scheduler_config.json", "missing", own_checkpoint / "model_index.json")


def test_a_changed_tensor_that_is_not_quantized(own_checkpoint: Path) -> None:
    tensors = load_file(own_checkpoint / WEIGHTS)
    tensors[f"{BLOCK}.attn.norm_q.weight"] += 1
    save_file(tensors, own_checkpoint / WEIGHTS, metadata={"format": "pt"})
    [problem] = verify_checkpoint(own_checkpoint).problems
    assert names(problem, WEIGHTS, "changed")


def test_without_digests_the_other_components_are_not_covered(own_checkpoint: Path) -> None:
    (own_checkpoint / DIGESTS_NAME).unlink()
    report = verify_checkpoint(own_checkpoint)
    assert (report.problems, report.num_files) == ([], 0)
    assert report.not_covered == ("model_index.json", "scheduler")
    (own_checkpoint / "scheduler" / "scheduler_config.json").write_text("{")
    [problem] = verify_checkpoint(own_checkpoint).problems
    assert names(problem, "scheduler_config.json")


@pytest.mark.parametrize(
    "content", ["[]", "{", "{}", '{"format_version": 99, "files": {}}', '{"format_version": 1, "files": []}']
)
def test_a_file_of_digests_that_cannot_be_used(own_checkpoint: Path, content: str) -> None:
    (own_checkpoint / DIGESTS_NAME).write_text(content)
    [problem] = verify_checkpoint(own_checkpoint).problems
    assert str(own_checkpoint / DIGESTS_NAME) in problem


def test_digests_of_files_outside_are_not_read(own_checkpoint: Path) -> None:
    path = own_checkpoint / DIGESTS_NAME
    content = json.loads(path.read_text())
    content["files"]["../../outside"] = content["files"]["/etc/passwd"] = "0" * 64
    path.write_text(json.dumps(content))
    (own_checkpoint.parent / "outside").write_text("x")
    for problem, file in zip(verify_checkpoint(own_checkpoint).problems, ("../../outside", "/etc/passwd"), strict=True):
        assert names(problem, file, "missing")
