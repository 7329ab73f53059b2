"""What `check_model` finds in a folder whose files are all there: tensors, classes and settings that do not fit each other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
)

from reelquant.checkpoint.pipeline_files import is_model, list_files
from reelquant.checkpoint.reader import source_weights
from tests.errors import names, raises
from workers.model_source import check_model, load_tensors, model_problems, read_pipeline

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(digits_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_model, tmp_path / "model"))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_tensors_of_all_components_are_compared_with_their_classes(model: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["x_embedder.proj.weight"]
        tensors["transformer_blocks.0.attn.to_q.weight"] = torch.ones(7, 5)
        tensors["unused.weight"] = torch.ones(1)

    edit_tensors(model / TRANSFORMER, damage)
    edit_tensors(model / VAE, lambda tensors: tensors.pop("decoder.conv_in.conv.weight"))
    encoder = "text_encoder_2/model.safetensors"
    edit_tensors(model / encoder, lambda t: t.update({"embeddings.token_embedding.weight": torch.ones(3, 128)}))
    problems = model_problems(model)
    for file, tensor in (
        ("transformer ", "x_embedder.proj.weight"),
        (f"{TRANSFORMER}:", "transformer_blocks.0.attn.to_q.weight"),
        ("transformer ", "unused.weight"),
        ("vae ", "decoder.conv_in.conv.weight"),
        (f"{encoder}:", "embeddings.token_embedding.weight"),
    ):
        assert [p for p in problems if str(model / file) in p and tensor in p], (file, tensor, problems)
    assert len(problems) == 5


def test_a_config_of_another_size_than_the_weights(model: Path) -> None:
    edit_json(model / "transformer" / "config.json", num_layers=9)
    [problem] = model_problems(model)
    assert names(problem, model / "transformer", "transformer_blocks.3")


def test_what_a_class_itself_may_lack_or_have_too_much(model: Path) -> None:
    """Unused tensors of a text encoder, such as a head's, are its loader's business."""
    edit_tensors(model / "text_encoder" / "model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(1)}))
    assert model_problems(model) == []


def test_missing_and_broken_settings_are_named_together(model: Path) -> None:
    (model / "text_encoder" / "config.json").unlink()
    (model / "scheduler" / "scheduler_config.json").unlink()
    (model / "vae" / "config.json").write_text("")
    (model / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    (model / "tokenizer_2" / "tokenizer_config.json").write_text("[1, 2]")
    problems = model_problems(model)
    for name in (
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "tokenizer:",
        "tokenizer_2/tokenizer_config.json",
    ):
        assert [p for p in problems if str(model / name) in p], (name, problems)
    assert not check_model(model).can_plan


INDEX_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "HunyuanVideoImageToVideoPipeline"}, "image"),
    ({"_class_name": ["evil", "Evil"]}, "['evil', 'Evil']"),
    ({"_class_name": "NoSuchPipeline"}, "NoSuchPipeline"),
    ({"vae": ["os", "system"]}, "['os', 'system']"),
    ({"vae": [["diffusers"], "AutoencoderKL"]}, "vae"),
    ({"vae": ["diffusers", "NoSuchAutoencoder"]}, "NoSuchAutoencoder"),
    ({"vae": [None, None]}, "vae"),
    ({"../../evil": ["diffusers", "AutoencoderKL"]}, "../../evil"),
]


@pytest.mark.parametrize(("changes", "named"), INDEX_MISTAKES)
def test_an_index_that_cannot_be_a_text_to_video_pipeline(model: Path, changes: dict[str, Any], named: str) -> None:
    edit_json(model / "model_index.json", **changes)
    checked = check_model(model, weights=False)
    assert [p for p in checked.problems if named in p and "model_index.json" in p], checked.problems
    assert not checked.can_plan


def test_components_that_the_pipeline_needs_are_named(model: Path) -> None:
    edit_json(model / "model_index.json", tokenizer=[None, None], text_encoder_2=[None, None])
    for problem, component in zip(model_problems(model), ("text_encoder_2", "tokenizer"), strict=True):
        assert names(problem, model / "model_index.json", component)


@pytest.mark.parametrize("content", ["[1, 2]", "", "{", '"text"'])
def test_an_index_that_is_no_json_object_is_named(model: Path, content: str) -> None:
    (model / "model_index.json").write_text(content)
    [problem] = model_problems(model)
    assert str(model / "model_index.json") in problem


CONFIG_MISTAKES: list[dict[str, Any]] = [
    {"attention_head_dim": 32},
    {"rope_axes_dim": [16, 24, 16]},
    {"num_layers": "x"},
]


@pytest.mark.parametrize("changes", CONFIG_MISTAKES)
def test_a_transformers_config_that_contradicts_itself(model: Path, changes: dict[str, Any]) -> None:
    edit_json(model / "transformer" / "config.json", **changes)
    checked = check_model(model, weights=False)
    assert [p for p in checked.problems if str(model / "transformer" / "config.json") in p]
    assert not checked.can_plan


def test_every_weight_component_is_read(model: Path) -> None:
    """Also those that no list of names would have, and one behind a link to a folder."""
    shutil.copytree(model / "text_encoder_2", model.parent / "elsewhere")
    (model / "image_encoder").symlink_to("../elsewhere")
    edit_json(model / "model_index.json", image_encoder=["transformers", "CLIPTextModel"])
    sound = check_model(model)
    assert sound.problems == ()
    name = "embeddings.position_embedding.weight"
    edit_tensors(model.parent / "elsewhere" / "model.safetensors", lambda t: t[name].mul_(2))
    assert check_model(model).fingerprint != sound.fingerprint
    edit_tensors(model.parent / "elsewhere" / "model.safetensors", lambda t: t[name].mul_(torch.nan))
    [problem] = model_problems(model)
    assert names(problem, model / "image_encoder" / "model.safetensors", name)


def test_an_adapter_that_a_loader_would_add_is_refused(model: Path) -> None:
    (model / "text_encoder" / "adapter_config.json").write_text("{}")
    [problem] = model_problems(model)
    assert str(model / "text_encoder" / "adapter_config.json") in problem


def test_what_loaders_do_not_read_changes_no_fingerprint(digits_model: Path, model: Path) -> None:
    expected = check_model(digits_model).fingerprint
    (model / ".cache" / "huggingface").mkdir(parents=True)
    for stray in ("README.md", "demo.mp4", ".cache/huggingface/x.metadata", "text_encoder/pytorch_model.bin"):
        (model / stray).write_text("stray")
    shutil.copy(model / VAE, model / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert check_model(model).fingerprint == expected
    edit_json(model / "tokenizer" / "tokenizer_config.json", model_max_length=7)
    assert check_model(model).fingerprint != expected


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt"])
def test_pickled_weights_alone_are_named_and_not_read(model: Path, name: str) -> None:
    (model / VAE).rename(model / "vae" / name)
    [problem] = model_problems(model)
    assert names(problem, model / "vae", name, "save_pretrained")


def test_a_variant_is_taken_where_it_is_asked_for_and_named_where_it_is_not(model: Path) -> None:
    vae = AutoencoderKLHunyuanVideo.from_pretrained(model / "vae", torch_dtype=torch.float16)
    (model / VAE).unlink()
    vae.save_pretrained(model / "vae", variant="fp16", max_shard_size="1MB")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder_2", dtype=torch.float16)
    (model / "text_encoder_2" / "model.safetensors").unlink()
    encoder.save_pretrained(model / "text_encoder_2", variant="fp16")
    plain = model_problems(model)
    assert len(plain) == 2
    assert all(names(problem, "fp16", "model_variant") for problem in plain)
    assert model_problems(model, variant="fp16") == []
    [problem] = model_problems(model, variant="bf16")[:1]
    assert names(problem, "model_variant", "bf16", "fp16")
    assert sum(".fp16" in path.name for path in list_files(model, variant="fp16")[0].values()) > 3
    (model / "text_encoder" / "LICENSE").write_text("x")
    [problem] = model_problems(model, variant="fp16")
    assert str(model / "text_encoder" / "LICENSE") in problem
    with pytest.raises(IndexError):  # in diffusers: once it loads this, the check goes
        read_pipeline(model, dtype=torch.float16, variant="fp16")
    (model / "text_encoder" / "LICENSE").unlink()
    loaded = read_pipeline(model, dtype=torch.float16, variant="fp16")
    state = loaded.vae.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in vae.state_dict().items())


def test_every_shard_is_opened_once_however_many_blocks_are_loaded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    whole = load_file(model / VAE)
    AutoencoderKLHunyuanVideo.from_pretrained(model / "vae").save_pretrained(model / "cut", max_shard_size="500KB")

    def watched(path: Path, **options: Any) -> Any:
        opened.append(path)
        return safe_open(path, **options)

    monkeypatch.setattr("reelquant.checkpoint.safetensors_file.safe_open", watched)
    weights = source_weights(model / "cut")
    for prefix in ("decoder.mid_block", "encoder.mid_block", "decoder.mid_block.resnets.0"):
        inside = {name.removeprefix(f"{prefix}."): t for name, t in whole.items() if name.startswith(f"{prefix}.")}
        tensors = load_tensors(weights, prefix)
        assert inside
        assert tensors.keys() == inside.keys()
        assert all(torch.equal(tensor, inside[name]) for name, tensor in tensors.items())
    assert sorted(opened) == sorted((model / "cut").glob("*.safetensors"))
    assert len(opened) > 5
    opened[0].unlink()
    opened[1].write_bytes(opened[1].read_bytes()[:-1])
    with raises(ValueError, opened[0].name, opened[1]):
        source_weights(model / "cut")


def test_which_classes_have_weights_as_transformers_lists_them() -> None:
    def listed(module: Any, *mappings: str) -> set[str]:
        def flat(value: Any) -> set[str]:
            if value is None or isinstance(value, str):
                return {value} - {None}  # type: ignore[return-value]
            inner = value.values() if isinstance(value, dict) else value
            return {name for part in inner for name in flat(part)}

        return {name for mapping in mappings for name in flat(dict(getattr(module, mapping)))}

    models = listed(modeling_auto, *(name for name in vars(modeling_auto) if name.endswith("_MAPPING_NAMES")))
    assert len(models) > 500
    assert [name for name in models if not is_model("transformers", name)] == []
    settings = (
        listed(tokenization_auto, "TOKENIZER_MAPPING_NAMES")
        | listed(image_processing_auto, "IMAGE_PROCESSOR_MAPPING_NAMES")
        | listed(feature_extraction_auto, "FEATURE_EXTRACTOR_MAPPING_NAMES")
        | listed(processing_auto, "PROCESSOR_MAPPING_NAMES")
    )
    assert len(settings) > 100
    assert [name for name in settings if is_model("transformers", name)] == []
