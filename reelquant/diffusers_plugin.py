"""Loads reelquant checkpoints with diffusers' own `from_pretrained`, and saves them with its `save_pretrained`.

diffusers has no function to register a quantizer: `register` writes its two tables, which importing this module does
(`reelquant.registration`).
All names, shapes and dtypes in the weight files are checked before a tensor is loaded. Quantized layers' tensors are
placed by `create_quantized_param` from the file's own tensor: the one that diffusers hands over is already cast to
`torch_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import is_accelerate_available, logging
from torch import Tensor, nn

from reelquant.checkpoint.layer_packing import value_problem
from reelquant.checkpoint.reader import disagreements, quantized_layers
from reelquant.checkpoint.safetensors_file import open_file
from reelquant.checkpoint.schema import QUANT_METHOD, QuantizationSpec
from reelquant.diffusers_internals import ignored_keys, register_quantizer, remove_from_config
from reelquant.families.family import family_of_architecture
from reelquant.noise_schedule import Schedule, shifted_levels
from reelquant.quantization.dequantization import dequantize_linear_layers, num_parameters
from reelquant.quantization.layer_spec import GROUP_SUFFIXES, LAYER_SUFFIXES, TensorInfo
from reelquant.quantization.linear import QuantizedLinear, replace_linear_layers
from reelquant.runtime.attach import attach_runtime, detach_runtime
from reelquant.runtime.pipeline_schedule import PipelineSchedule

logger = logging.get_logger(__name__)


class ReelquantMethod(StrEnum):
    """The method's name in the shape in which diffusers reads it: a string with a `value`."""

    REELQUANT = QUANT_METHOD


class ReelquantConfig(QuantizationConfigMixin):
    """`quantization_config` of a transformer; `spec` is its content."""

    def __init__(self, quant_method: str = QUANT_METHOD, **values: Any) -> None:
        """Takes the keys of `QuantizationSpec.to_dict`; others are logged and left out.

        Raises:
            ValueError: the format is newer than this package, or the values are not possible.
        """
        self.quant_method = ReelquantMethod(quant_method)
        known = {key: value for key, value in values.items() if key in QuantizationSpec.__dataclass_fields__}
        self._stored = known
        self.spec = QuantizationSpec.from_dict(known)
        if len(known) < len(values):
            logger.info(f"quantization_config: keys without a meaning are left out: {sorted(set(values) - set(known))}")

    def translate(self, schedule: Schedule) -> None:
        """Reads the configuration again: one of an older version counts steps of `schedule`."""
        self.spec = QuantizationSpec.from_dict(self._stored, schedule=schedule)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return self.spec.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`: there are no defaults to leave out."""
        return self.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class ReelquantQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads and saves a quantized transformer."""

    use_keep_in_fp32_modules = True
    requires_calibration = True

    def __init__(self, quantization_config: ReelquantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stored: dict[str, TensorInfo] = {}
        self._unlisted: list[str] = []
        self._layers: dict[str, QuantizedLinear] = {}
        self._folder: Path | None = None
        self._value_problems: list[str] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses what the loading needs or cannot do.

        Raises:
            ImportError: accelerate, with which diffusers loads quantized models, is not installed.
            ValueError: a part of the model is to be offloaded to the disk.
        """
        if not is_accelerate_available():
            raise ImportError("diffusers loads quantized models with accelerate: pip install accelerate")
        parts = device_map if isinstance(device_map, Mapping) else {}
        if on_disk := [part or "the whole model" for part, device in parts.items() if device == "disk"]:
            raise ValueError(
                f"device_map: {', '.join(on_disk)}: quantized layers cannot be offloaded to the disk, where diffusers would "
                "store their scales in torch_dtype; use the CPU in place of the disk"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Reads the headers of the weight files.

        Raises:
            ValueError: a file is damaged or no safetensors file.
        """
        self._stored, self._unlisted, loaded = {}, [], set(loaded_keys)
        self._folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        for file in checkpoint_files:
            tensors, _ = open_file(Path(file))
            self._stored.update({name: tensor.info for name, tensor in tensors.items()})
            unlisted = sorted(set(tensors) - loaded)
            where = f"lies in {Path(file).name}, but the index does not say so"
            self._unlisted += [f"tensor {name}: {where}" for name in unlisted]
        return loaded_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether the tensor is one that `create_quantized_param` places."""
        layer, _, suffix = param_name.rpartition(".")
        return layer in self._layers and suffix in LAYER_SUFFIXES

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Places a quantized layer's tensor on its device, in the dtype in which it is stored."""
        layer, _, suffix = param_name.rpartition(".")
        stored: Tensor = state_dict[param_name]
        if stored.is_floating_point() or suffix == "group_scale":
            problem = value_problem(suffix, stored)
            if problem is not None:
                self._value_problems.append(f"tensor {param_name}: {problem}")
        loaded = stored.to(target_device)
        setattr(self._layers[layer], suffix, loaded)
        if suffix in GROUP_SUFFIXES:
            for member in self._layers.values():
                if member.spec.group == layer != member.name:
                    setattr(member, suffix, loaded.clone())

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._value_problems = []
        replace_linear_layers(model, self.quantization_config.spec.layers)
        self._layers = quantized_layers(model)
        _refuse([*self._unlisted, *disagreements(model, self._stored, ignored=ignored_keys(model))])

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        problems = self._value_problems
        for name, layer in self._layers.items():
            for suffix in LAYER_SUFFIXES:
                tensor = getattr(layer, suffix)
                if tensor is not None and tensor.is_meta:
                    problems.append(f"tensor {name}.{suffix}: was not loaded")
        _refuse(problems)
        self._layers = {}
        architecture = type(model).__name__
        schedule: Schedule = shifted_levels
        if self._folder is not None:
            schedule = PipelineSchedule(self._folder.parent, family_of_architecture(architecture))
            self.quantization_config.translate(schedule)
        attach_runtime(model, self.quantization_config.spec, schedule=schedule, stored=self.quantization_config)
        model.num_parameters = partial(num_parameters, model)  # type: ignore[assignment]
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        """Makes `model` a plain one: linear layers, diffusers' attention, no protected steps and no velocity correction."""
        detach_runtime(model)
        dequantize_linear_layers(model, model.dtype)  # type: ignore[arg-type]
        model.__dict__.pop("num_parameters", None)
        remove_from_config(model, "quantization_config")
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Refuses to save anything but safetensors.

        Raises:
            ValueError: pickled weights are asked for.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: quantized weights are saved as safetensors only")
        return state_dict, {}

    @property
    def is_serializable(self) -> bool:
        """Quantized models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Quantized layers pass no gradient."""
        return False


def register() -> None:
    """Makes the checkpoint format known to diffusers; calling it again changes nothing."""
    register_quantizer(QUANT_METHOD, ReelquantQuantizer, ReelquantConfig)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            "the weights are not what the quantization_config describes (run reelquant's verify on the checkpoint): "
            + "; ".join(problems)
        )


register()
