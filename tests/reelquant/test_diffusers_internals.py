"""Canaries: each fails when diffusers changes a private interface that this project uses, and says which."""

import ast
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CacheMixin,
    DiffusionPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    ModelMixin,
    WanTransformer3DModel,
)
from diffusers.hooks import _helpers
from diffusers.models import modeling_utils
from diffusers.quantizers import auto
from packaging.requirements import Requirement
from torch import nn

from reelquant import diffusers_internals
from reelquant.diffusers_internals import (
    TESTED_DIFFUSERS,
    MovedInterfaceError,
    at_end_of_call,
    block_streams,
    execution_device,
    float32_modules,
    ignored_keys,
    no_initial_weights,
    optional_components,
    register_quantizer,
    remove_from_config,
    unsplit_classes,
)
from tests.errors import raises

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("reelquant", "workers", "pipeline", "cluster", "storage", "benchmarks", "tools")
WAN: dict[str, Any] = {
    "num_attention_heads": 1, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 8,
    "ffn_dim": 8, "num_layers": 1, "cross_attn_norm": True,
}  # fmt: skip
HUNYUAN: dict[str, Any] = {
    "num_attention_heads": 1, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 8, "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4),
}  # fmt: skip


def changed(interface: str) -> str:
    return f"diffusers {diffusers.__version__} has changed {interface}: mend {diffusers_internals.__file__}"


@pytest.fixture(scope="module")
def wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(**WAN)


def hunyuan_pipeline() -> HunyuanVideoPipeline:
    components = dict.fromkeys(("text_encoder", "tokenizer", "vae", "scheduler", "text_encoder_2", "tokenizer_2"))
    return HunyuanVideoPipeline(transformer=HunyuanVideoTransformer3DModel(**HUNYUAN), **components)


def test_the_tables_of_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        def __init__(self, quant_method: str) -> None:
            self.quant_method = quant_method

        @classmethod
        def from_dict(cls, values: dict[str, str]) -> "Config":
            return cls(**values)

    class Quantizer:
        def __init__(self, config: Config, **_: Any) -> None:
            self.config = config

    tables = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")
    for table in tables:
        monkeypatch.setattr(auto, table, dict(getattr(auto, table, {})))
    register_quantizer("canary", Quantizer, Config)
    found: Any = auto.DiffusersAutoQuantizer.from_config({"quant_method": "canary"})
    assert type(found) is Quantizer, changed(" and ".join(tables))
    assert type(found.config) is Config, changed(tables[1])


def test_the_configuration_of_a_model() -> None:
    model, other = (WanTransformer3DModel(**WAN) for _ in range(2))
    for each in (model, other):
        each.register_to_config(quantization_config={"quant_method": "canary"})
    remove_from_config(model, "quantization_config")
    assert "quantization_config" not in model.config, changed("ConfigMixin._internal_dict")
    assert "quantization_config" not in model.to_json_string(), changed("ConfigMixin._internal_dict")
    assert model.config.ffn_dim == WAN["ffn_dim"], changed("ConfigMixin._internal_dict")
    assert "quantization_config" in other.config


def test_keys_without_a_place(tmp_path: Path) -> None:
    interface = "ModelMixin._keys_to_ignore_on_load_unexpected"
    extended = WanTransformer3DModel(**WAN)
    assert ignored_keys(extended) == ("norm_added_q",), changed(interface)
    assert ignored_keys(hunyuan_pipeline().transformer) == ()
    for name in ("norm_added_q", "canary"):
        extended.register_parameter(name, nn.Parameter(torch.zeros(1)))
    extended.save_pretrained(tmp_path)
    _, found = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert found["unexpected_keys"] == ["canary"], changed(interface)


def test_modules_kept_in_float32(tmp_path: Path, wan: WanTransformer3DModel) -> None:
    wan.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kept = {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32}
    expected = {name for name, _ in loaded.named_parameters() if float32_modules(type(wan)) & set(name.split("."))}
    assert expected, changed("ModelMixin._keep_in_fp32_modules")
    assert kept == expected, changed("ModelMixin._keep_in_fp32_modules")
    assert float32_modules(HunyuanVideoTransformer3DModel) == frozenset()


def test_classes_of_blocks(wan: nn.Module) -> None:
    for model, blocks in (
        (wan, {"WanTransformerBlock"}),
        (hunyuan_pipeline().transformer, {"HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"}),
    ):
        classes = {type(module).__name__ for module in model.modules()}
        assert blocks <= classes & unsplit_classes(model), changed("ModelMixin._no_split_modules")


def test_models_without_drawn_weights() -> None:
    before = torch.get_rng_state()
    with no_initial_weights():
        nn.Linear(3, 3)
        nn.Conv3d(1, 2, 3)
    assert torch.equal(torch.get_rng_state(), before), changed("modeling_utils.no_init_weights")
    nn.Linear(3, 3)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_end_of_a_call() -> None:
    pipeline, calls = hunyuan_pipeline(), []
    at_end_of_call(pipeline.transformer, lambda: calls.append("end"))
    pipeline.maybe_free_model_hooks()  # all pipelines of diffusers end with it
    assert calls == ["end"], changed("CacheMixin._reset_stateful_cache")


def test_the_device_of_a_pipeline() -> None:
    assert execution_device(hunyuan_pipeline()) == torch.device("cpu"), changed("DiffusionPipeline._execution_device")


def test_components_that_may_be_absent() -> None:
    interface = "DiffusionPipeline._optional_components"
    assert optional_components(DiffusionPipeline) == frozenset(), changed(interface)
    assert "transformer_2" in optional_components(diffusers.WanPipeline), changed(interface)


def test_what_a_block_hands_to_the_next_one() -> None:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformerBlock
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    class Sharded(WanTransformerBlock):
        """As FSDP makes one."""

    interface = "hooks._helpers.TransformerBlockRegistry"
    both = {0: "hidden_states", 1: "encoder_hidden_states"}
    assert block_streams(HunyuanVideoTransformerBlock) == both, changed(interface)
    assert block_streams(Sharded) == {0: "hidden_states"}, changed(interface)
    with raises(ValueError, "Linear"):
        block_streams(nn.Linear)


class Moved:
    """A model's class of a diffusers without any of the interfaces."""

    config = {"key": 1}  # noqa: RUF012


@pytest.mark.parametrize(
    ("owner", "name", "use"),
    [
        (auto, "AUTO_QUANTIZER_MAPPING", lambda: register_quantizer("canary", Moved, Moved)),
        (auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", lambda: register_quantizer("canary", Moved, Moved)),
        (None, "_internal_dict", lambda: remove_from_config(Moved(), "key")),  # type: ignore[arg-type]
        (ModelMixin, "_keys_to_ignore_on_load_unexpected", lambda: ignored_keys(nn.Linear(1, 1))),
        (ModelMixin, "_keep_in_fp32_modules", lambda: float32_modules(nn.Linear)),
        (ModelMixin, "_no_split_modules", lambda: unsplit_classes(nn.Linear(1, 1))),
        (modeling_utils, "no_init_weights", no_initial_weights),
        (CacheMixin, "_reset_stateful_cache", lambda: at_end_of_call(nn.Linear(1, 1), lambda: None)),
        (_helpers, "TransformerBlockRegistry", lambda: block_streams(nn.Linear)),
        (None, "_execution_device", lambda: execution_device(Moved())),
        (None, "_optional_components", lambda: optional_components(Moved)),
    ],
)
def test_an_interface_that_has_moved_is_named(
    owner: Any, name: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "AUTO_QUANTIZATION_CONFIG_MAPPING":
        monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", {})
    if owner is not None:
        monkeypatch.delattr(owner, name)
    with raises(MovedInterfaceError, name, diffusers.__version__, TESTED_DIFFUSERS):
        use()


def test_the_tested_release() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [needed] = [Requirement(one) for one in project["dependencies"] if one.startswith("diffusers")]
    assert [(one.operator, one.version) for one in needed.specifier] == [(">=", TESTED_DIFFUSERS)]
    assert f"diffusers=={TESTED_DIFFUSERS}.*" in project["optional-dependencies"]["dev"]
    assert f"diffusers {TESTED_DIFFUSERS}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert diffusers.__version__ in Requirement(f"diffusers=={TESTED_DIFFUSERS}.*").specifier


def private_imports(path: Path) -> set[str]:
    """Imports of a module or a name of diffusers or accelerate that begins with an underscore, and of accelerate all that lies
    below its first floor, which alone it promises to keep."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            deep = package == "accelerate" and len(parts) > 1
            if package in ("diffusers", "accelerate") and (deep or any(part.startswith("_") for part in parts)):
                found.add(f"{path.relative_to(ROOT)}: {name}")
    return found


def test_no_other_file_imports_what_is_private() -> None:
    assert set().union(*(private_imports(path) for path in sources())) == set()


def sources() -> list[Path]:
    """All files but the one whose purpose it is."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return [path for path in paths if path != Path(diffusers_internals.__file__)]


def test_no_other_file_uses_them() -> None:
    text = Path(diffusers_internals.__file__).read_text(encoding="utf-8")
    table = "\n".join(re.findall(r"^\| (.*) \|.*\|$", text, re.M))
    names = set(re.findall(r"\b(_[a-z0-9_]+|AUTO_[A-Z_]+|no_init_weights)\b", table))
    assert {"_internal_dict", "AUTO_QUANTIZER_MAPPING", "no_init_weights"} <= names
    used = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources()
        for name in names & set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    }
    assert used == set()
