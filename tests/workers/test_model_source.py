"""What is wrong with a model folder is found before any work, all of it at once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reelquant.checkpoint.reader import source_weights
from tests.errors import names
from tests.reelquant.families import tiny_pipelines
from workers.model_source import load_block, model_problems, open_pipeline


@pytest.fixture
def model(digits_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_model, tmp_path / "model"))


def weights(model: Path) -> Path:
    return model / "transformer" / "diffusion_pytorch_model.safetensors"


def test_the_shipped_model_is_sound(digits_model: Path) -> None:
    assert model_problems(digits_model) == []


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    assert names(model_problems(tmp_path / "nowhere")[0], tmp_path / "nowhere")
    assert names(model_problems(tmp_path)[0], "model_index.json")


def test_missing_parts_are_named_together(model: Path) -> None:
    shutil.rmtree(model / "tokenizer_2")
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert names("\n".join(model_problems(model)), "tokenizer_2", "vae")


def test_another_architecture_and_a_quantized_model_are_refused(model: Path) -> None:
    path = model / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_class_name": "AllegroTransformer3DModel"}))
    assert names("\n".join(model_problems(model)), "AllegroTransformer3DModel")
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "reelquant"}}))
    assert names("\n".join(model_problems(model)), model / "transformer", "quantized")


def test_a_second_transformer_is_not_passed_over(model: Path) -> None:
    """A pipeline with an expert for the later steps: half of it would stay as it is."""
    shutil.copytree(model / "transformer", model / "transformer_2")
    index = json.loads((model / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (model / "model_index.json").write_text(json.dumps(index))
    assert names("\n".join(model_problems(model)), "transformer_2", "HunyuanVideo", 16)


def test_two_transformers_of_one_size_and_a_boundary_are_needed(tmp_path: Path) -> None:
    model = tiny_pipelines.wan_2_2(tmp_path / "model")
    assert model_problems(model) == []
    index = json.loads((model / "model_index.json").read_text())
    for boundary in (None, 1.5):
        (model / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": boundary}))
        assert names("\n".join(model_problems(model)), "boundary_ratio", boundary, "transformer_2")
    path = model / "transformer_2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 2}))
    assert names("\n".join(model_problems(model)), path, "num_layers")


def test_a_truncated_file_and_nan_weights_are_named(model: Path) -> None:
    tensors = load_file(weights(model))
    name = "single_transformer_blocks.2.proj_out.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, weights(model))
    assert names("\n".join(model_problems(model)), weights(model), name)
    weights(model).write_bytes(weights(model).read_bytes()[:-1000])
    assert names("\n".join(model_problems(model)), weights(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_weight_anywhere_is_found(model: Path, value: float) -> None:
    tensors = load_file(weights(model))
    for name, place in (("single_transformer_blocks.0.proj_mlp.weight", -1), ("x_embedder.proj.bias", 0)):
        kept = tensors[name].clone()
        tensors[name].view(-1)[place] = value
        save_file(tensors, weights(model))
        [problem] = model_problems(model)
        assert names(problem, weights(model), name)
        tensors[name] = kept


def test_videos_are_decoded_in_tiles_of_space(digits_model: Path) -> None:
    vae = open_pipeline(digits_model, device=torch.device("cpu"), dtype=torch.float32).vae
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, vae.config.latent_channels, 3, 20, 24, generator=generator)
    calls: list[torch.Size] = []
    handle = vae.decoder.register_forward_pre_hook(lambda _module, args: calls.append(args[0].shape[-2:]))
    with torch.no_grad():
        one_tile = vae.decode(latents).sample
        assert set(calls) == {(20, 24)}
        vae.use_tiling = False
        assert torch.equal(one_tile, vae.decode(latents).sample), "one tile is the whole video"
        vae.use_tiling = True
        calls.clear()
        vae.decode(torch.randn(1, vae.config.latent_channels, 1, 20, 72, generator=generator))
    handle.remove()
    assert (20, 64) in calls
    assert (20, 72) not in calls


def test_a_block_is_loaded_without_the_model(digits_model: Path) -> None:
    pipeline = open_pipeline(digits_model, device=torch.device("cpu"), dtype=torch.float32)
    stored = source_weights(digits_model / "transformer")
    for name in ("transformer_blocks.2", "single_transformer_blocks.5"):
        block = load_block(digits_model, stored, name, device=torch.device("cpu"), dtype=torch.float32)
        inside = pipeline.transformer.get_submodule(name).state_dict()
        assert inside.keys() == block.state_dict().keys()
        for key, value in block.state_dict().items():
            assert torch.equal(value, inside[key]), key
