import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reelquant.checkpoint.reader import quantized_layers
from reelquant.checkpoint.schema import QuantizationSpec
from reelquant.checkpoint.verify import verify_checkpoint
from reelquant.checkpoint.writer import write_checkpoint
from reelquant.diffusers_plugin import ReelquantConfig
from reelquant.quantization.layer_spec import LAYER_SUFFIXES
from reelquant.quantization.linear import QuantizedLinear
from tests.errors import raises

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "transformer_blocks.0"
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"

DIGITS_GROUPS = {
    "transformer_blocks.0": [(("attn.to_q", "attn.to_k", "attn.to_v"), 4, 6, "two_level", True)],
    "single_transformer_blocks.1": [
        (("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), 4, 8, "per_channel", True),
        (("proj_out",), 8, 16, "per_channel", False),
    ],
}

FRESH_PROCESS = """
import sys
import reelquant
assert not {"torch", "diffusers"} & sys.modules.keys()
from reelquant.diffusers_plugin import ReelquantConfig, ReelquantQuantizer  # imports the tables, which ask for it
from diffusers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["reelquant"] is ReelquantQuantizer
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["reelquant"] is ReelquantConfig
import torch
from diffusers import DiffusionPipeline

def generate(path):
    pipe = DiffusionPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    latents = pipe(prompt="a seven", height=32, width=32, num_frames=5, num_inference_steps=2, max_sequence_length=16,
                   prompt_template={"template": "{}", "crop_start": 0}, generator=generator, output_type="latent").frames
    return pipe, latents

first, a = generate(sys.argv[1])
first.save_pretrained(sys.argv[2], max_shard_size="300KB")
second, b = generate(sys.argv[2])
one, two = first.transformer.state_dict(), second.transformer.state_dict()
assert list(one) == list(two)
for name in one:
    assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name
assert a.isfinite().all() and torch.equal(a, b)
from reelquant.quantization.linear import QuantizedLinear
print("quantized", sum(isinstance(m, QuantizedLinear) for m in second.transformer.modules()), tuple(a.shape))
"""


def load(checkpoint: Path, **options: Any) -> nn.Module:
    model: nn.Module = HunyuanVideoTransformer3DModel.from_pretrained(checkpoint / "transformer", **options)
    return model


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 4, 2, 3, 5, generator=generator).to(dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 16, generator=generator).to(dtype),
        "encoder_attention_mask": torch.ones(1, 7),
        "pooled_projections": torch.randn(1, 8, generator=generator).to(dtype),
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }


@torch.no_grad()
def output(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    out: Tensor = model(**inputs(dtype))[0]
    return out


def same_tensors(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def edit_tensors(checkpoint: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def edit_config(checkpoint: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = checkpoint / "transformer" / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def test_fresh_process_loads_generates_saves_and_loads_again(
    digits_model: Path, artifact_writer: Callable[..., list[Path]], tmp_path: Path
) -> None:
    source = HunyuanVideoTransformer3DModel.from_pretrained(digits_model / "transformer")
    artifacts = artifact_writer(source, DIGITS_GROUPS, tmp_path)
    checkpoint, saved = tmp_path / "checkpoint", tmp_path / "saved"
    write_checkpoint(digits_model, checkpoint, artifacts=artifacts, bits="W4A6", method="test")
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(checkpoint), str(saved)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("quantized 8 (1, 8, "), done.stdout  # DeepSpeed may print first
    assert len(list((saved / "transformer").glob("*.safetensors"))) > 1
    report = verify_checkpoint(saved)
    assert report.problems == []
    assert len(report.layers) == 8


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_quantized_tensors_keep_their_dtypes_and_values(tiny_checkpoint: Path, dtype: torch.dtype | None) -> None:
    model = load(tiny_checkpoint, torch_dtype=dtype)
    stored, loaded = load_file(tiny_checkpoint / WEIGHTS), model.state_dict()
    assert set(stored) == set(loaded)
    checked = 0
    for name, tensor in loaded.items():
        if name.rpartition(".")[2] in LAYER_SUFFIXES:
            assert tensor.dtype == stored[name].dtype, name
            assert torch.equal(tensor, stored[name]), name
            checked += 1
        else:
            assert tensor.dtype == (dtype or torch.float32), name
            assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
    assert checked > 14 * 2
    assert not model.training
    assert output(model, dtype or torch.float32).isfinite().all()


def test_model_computes_what_the_dequantized_one_does(tiny_source: Path, tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, torch_dtype=torch.float32)
    plain = HunyuanVideoTransformer3DModel.from_pretrained(tiny_source / "transformer", torch_dtype=torch.float32)
    source = output(plain, torch.float32)
    for name, layer in quantized_layers(model).items():
        linear = plain.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = layer.dequantized_weight()
    expected, out = output(plain, torch.float32), output(model, torch.float32)
    error = float((out - expected).norm() / expected.norm())
    lost = float((out - source).norm() / source.norm())
    # What is left is the activations' quantization; the weights' costs more.
    assert error < 0.012, error  # measured: 0.0095
    assert 2 * error < lost < 0.04, lost  # measured: 0.032


def test_inference_mode_changes_nothing(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, torch_dtype=torch.bfloat16)
    expected = output(model)
    with torch.inference_mode():
        assert torch.equal(model(**inputs(torch.bfloat16))[0], expected)


def test_num_parameters_are_those_of_the_source(tiny_source: Path, tiny_checkpoint: Path) -> None:
    plain: Any = HunyuanVideoTransformer3DModel.from_pretrained(tiny_source / "transformer")
    model: Any = load(tiny_checkpoint)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) < plain.num_parameters()


def test_dequantize_gives_a_plain_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model: Any = load(tiny_checkpoint, torch_dtype=torch.float32)
    quantized = output(model, torch.float32)
    weights = {name: layer.dequantized_weight() for name, layer in quantized_layers(model).items()}
    model.dequantize()
    assert not quantized_layers(model)
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items())
    plain = output(model, torch.float32)
    # The activations' quantization: measured 0.0095.
    assert 0 < float((plain - quantized).norm() / plain.norm()) < 0.012
    model.save_pretrained(tmp_path / "transformer")
    assert "quantization_config" not in json.loads((tmp_path / "transformer" / "config.json").read_text())
    again = load(tmp_path, torch_dtype=torch.float32)
    assert torch.allclose(output(again, torch.float32), plain, rtol=1e-5, atol=1e-5)
    assert again.num_parameters() == model.num_parameters()  # type: ignore[operator]


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_save_and_load_again(tiny_checkpoint: Path, tmp_path: Path, max_shard_size: str) -> None:
    model = load(tiny_checkpoint, torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "transformer", max_shard_size=max_shard_size)  # type: ignore[operator]
    again = load(tmp_path, torch_dtype=torch.bfloat16)
    assert same_tensors(model, again)
    assert torch.equal(output(model), output(again))
    # The transformer alone is no pipeline; nothing else is wrong with it.
    [problem] = verify_checkpoint(tmp_path).problems
    assert "model_index.json" in problem
    configs = [json.loads((path / "transformer" / "config.json").read_text()) for path in (tiny_checkpoint, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_pickled_weights_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load(tiny_checkpoint)
    with raises(ValueError, "safe_serialization=False"):
        model.save_pretrained(tmp_path, safe_serialization=False)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["norm_out.linear.weight", "transformer_blocks.0.attn.to_q.weight_packed"])
def test_a_tensor_that_the_index_forgets_is_not_made_up(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    model = load(tiny_checkpoint)
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="20KB")  # type: ignore[operator]
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"].pop(name)
    path.write_text(json.dumps(index))
    with raises(ValueError, name, file, "index"):
        load(folder)


def test_sharded_checkpoint_loads_the_same(
    tiny_source: Path, tiny_artifacts: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output_folder = tmp_path / "sharded"
    write_checkpoint(
        tiny_source, output_folder, artifacts=tiny_artifacts, bits="W4A6", method="test", max_shard_bytes=5_000
    )
    sharded, whole = load(output_folder, torch_dtype=torch.bfloat16), load(tiny_checkpoint, torch_dtype=torch.bfloat16)
    assert same_tensors(sharded, whole)
    assert torch.equal(output(sharded), output(whole))


def test_device_map(tiny_checkpoint: Path) -> None:
    expected = load(tiny_checkpoint, torch_dtype=torch.bfloat16)
    assert same_tensors(load(tiny_checkpoint, torch_dtype=torch.bfloat16, device_map="cpu"), expected)
    with raises(ValueError, "device_map", "disk", BLOCK):
        load(tiny_checkpoint, device_map={"": "cpu", BLOCK: "disk"}, offload_folder=tiny_checkpoint)


def test_moving_to_a_dtype(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, torch_dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with raises(ValueError, "dtype"):
        model.to(torch.float32)
    # What FSDP, accelerate and pipelines do to parts of the model passes by that check.
    model.get_submodule(BLOCK).to(torch.float32)
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] in LAYER_SUFFIXES:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert model.get_parameter(f"{BLOCK}.attn.to_q.bias").dtype == torch.float32


def test_names_every_tensor_that_is_missing_extra_or_wrong(own_checkpoint: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{BLOCK}.attn.to_q.channel_scale"]
        del tensors["x_embedder.proj.bias"]
        tensors["unknown.weight"] = torch.ones(2)
        tensors[f"{BLOCK}.attn.to_v.weight_packed"] = tensors[f"{BLOCK}.attn.to_v.weight_packed"][:, 1:].contiguous()
        tensors[f"{BLOCK}.ff.net.2.weight_scale"] = tensors[f"{BLOCK}.ff.net.2.weight_scale"].bfloat16()
        tensors["proj_out.weight"] = torch.ones(5, 24)
        plain = f"{BLOCK}.norm1.linear"
        del tensors[f"{plain}.weight_packed"]
        tensors[f"{plain}.weight"] = torch.ones(144, 24)

    edit_tensors(own_checkpoint, damage)
    problems = verify_checkpoint(own_checkpoint).problems
    about_weights = [problem for problem in problems if problem.startswith(("tensor ", "layer "))]
    assert len(about_weights) == 9
    with raises(ValueError, "quantization_config", f"{BLOCK}.norm1.linear.weight", *about_weights):
        load(own_checkpoint)
    # The changed file has another digest, too.
    assert len(problems) == 10


def test_names_every_tensor_with_impossible_numbers(own_checkpoint: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{BLOCK}.attn.to_k.weight_scale"][2] = torch.nan
        tensors[f"{BLOCK}.attn.to_q.channel_scale"][0] = 0
        tensors[f"{BLOCK}.attn.to_q.rotation"][0, 0] = torch.inf

    edit_tensors(own_checkpoint, damage)
    broken = (f"{BLOCK}.attn.{name}" for name in ("to_k.weight_scale", "to_q.channel_scale", "to_q.rotation"))
    with raises(ValueError, "quantization_config", 1, *broken):
        load(own_checkpoint)


def test_truncated_file_is_refused(
    own_checkpoint: Path, tiny_source: Path, tiny_artifacts: list[Path], tmp_path: Path
) -> None:
    path = own_checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with raises(OSError, path):
        load(own_checkpoint)
    output_folder = tmp_path / "sharded"
    write_checkpoint(
        tiny_source, output_folder, artifacts=tiny_artifacts, bits="W4A6", method="test", max_shard_bytes=20_000
    )
    shard = sorted((output_folder / "transformer").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with raises(ValueError, shard):
        load(output_folder)


def test_newer_format_is_refused(own_checkpoint: Path) -> None:
    edit_config(own_checkpoint, lambda c: c["quantization_config"].update(format_version=99, new_key={"a": 1}))
    with raises(ValueError, "quantization_config", "format_version", 99):
        load(own_checkpoint)


def test_layer_that_the_model_lacks_is_refused(own_checkpoint: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        layers = config["quantization_config"]["layers"]
        layers["gone.q"] = {**layers[f"{BLOCK}.norm1.linear"], "group": "gone.q"}

    edit_config(own_checkpoint, rename)
    with raises(ValueError, "gone.q", "HunyuanVideoTransformer3DModel"):
        load(own_checkpoint)


def test_unknown_keys_are_left_out_without_a_warning(
    own_checkpoint: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(own_checkpoint, lambda c: c["quantization_config"].update(future_key=[1]))
    with caplog.at_level(logging.WARNING):
        model = load(own_checkpoint)
    assert not recwarn.list
    assert "future_key" not in caplog.text
    config: Any = model.config
    assert "future_key" not in config.quantization_config.to_dict()


def test_a_source_model_cannot_be_quantized_while_it_is_loaded(tiny_source: Path, tiny_checkpoint: Path) -> None:
    quantization = json.loads((tiny_checkpoint / "transformer" / "config.json").read_text())["quantization_config"]
    with raises(ValueError, "reelquant", "pre_quantized=False"):
        load(tiny_source, quantization_config=ReelquantConfig(**quantization))


def test_config_is_what_diffusers_expects(tiny_checkpoint: Path) -> None:
    quantization = json.loads((tiny_checkpoint / "transformer" / "config.json").read_text())["quantization_config"]
    config = ReelquantConfig.from_dict(quantization)
    assert config.quant_method == "reelquant"
    assert config.quant_method.value == "reelquant"
    assert json.loads(config.to_json_string()) == quantization == dict(config)
    assert "W4A6" in repr(config)
    assert isinstance(config.spec, QuantizationSpec)


def test_the_classes_fp32_list_is_left_alone(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["norm_out"]
    monkeypatch.setattr(HunyuanVideoTransformer3DModel, "_keep_in_fp32_modules", kept)
    model = load(tiny_checkpoint, torch_dtype=torch.bfloat16)
    assert kept == ["norm_out"]
    assert model.state_dict()["norm_out.linear.weight"].dtype == torch.float32
    assert model.state_dict()["proj_out.weight"].dtype == torch.bfloat16


def test_plain_models_load_as_before(tiny_source: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_source / "transformer", tmp_path / "transformer")
    model = load(tmp_path)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
