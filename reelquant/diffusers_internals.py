"""Private interfaces of diffusers that this project uses, where diffusers has no public one. The tests of this file say what
has changed when a new version of diffusers behaves differently. Of accelerate only public interfaces are used.

Where an interface is not there any more, every function raises `MovedInterfaceError`.

| interface | used for |
|---|---|
| `quantizers.auto.AUTO_QUANTIZER_MAPPING`, `AUTO_QUANTIZATION_CONFIG_MAPPING` | making the checkpoint format known |
| `ConfigMixin._internal_dict` | taking `quantization_config` out of a dequantized model's configuration |
| `ModelMixin._keys_to_ignore_on_load_unexpected` | tensors of a file that a model has no place for |
| `ModelMixin._keep_in_fp32_modules`, `_no_split_modules` | dtypes and blocks of a sharded model |
| `modeling_utils.no_init_weights` | building a model without drawing weights |
| `CacheMixin._reset_stateful_cache` | seeing a pipeline's call end |
| `DiffusionPipeline._execution_device` | drawing noise where an offloaded pipeline runs |
| `hooks._helpers.TransformerBlockRegistry` | which outputs of a block are the next one's inputs |
| `DiffusionPipeline._optional_components` | components that a pipeline can do without |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

TESTED_DIFFUSERS = "0.42"
"""The release of diffusers that the tests run with. No later one is refused."""


class MovedInterfaceError(ImportError):
    """The installed diffusers lacks a private interface that this package needs."""

    def __init__(self, interface: str) -> None:
        from diffusers import __version__

        super().__init__(
            f"diffusers {__version__} has no {interface}, which reelquant needs: install diffusers=={TESTED_DIFFUSERS}.*, with "
            "which reelquant is tested, or a later reelquant"
        )


@contextmanager
def _needs(interface: str) -> Iterator[None]:
    """Turns what a missing interface raises into an error that names it."""
    try:
        yield
    except (AttributeError, ImportError) as error:
        raise MovedInterfaceError(interface) from error


def _of_models(name: str) -> None:
    """Raises MovedInterfaceError where diffusers' models have no attribute `name`."""
    from diffusers import ModelMixin

    if not hasattr(ModelMixin, name):
        raise MovedInterfaceError(f"ModelMixin.{name}")


def register_quantizer(method: str, quantizer: type, config: type) -> None:
    """Makes a quantization method known to `from_pretrained`; calling it again changes nothing."""
    with _needs("quantizers.auto.AUTO_QUANTIZER_MAPPING or AUTO_QUANTIZATION_CONFIG_MAPPING"):
        from diffusers.quantizers import auto

        auto.AUTO_QUANTIZER_MAPPING[method] = quantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config


def remove_from_config(model: nn.Module, key: str) -> None:
    """Takes `key` out of the model's configuration; other models of the same configuration keep it."""
    changed: Any = model
    config = changed.config
    changed._internal_dict = type(config)({name: value for name, value in config.items() if name != key})
    if key in changed.config:
        raise MovedInterfaceError("ConfigMixin._internal_dict")


def ignored_keys(model: nn.Module) -> tuple[str, ...]:
    """Patterns of tensor names that a file may hold although the model has no place for them."""
    _of_models("_keys_to_ignore_on_load_unexpected")
    return tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def float32_modules(model_class: type) -> frozenset[str]:
    """Parts of parameter names that `from_pretrained` keeps in float32, whatever the dtype of the model."""
    _of_models("_keep_in_fp32_modules")
    found: Any = model_class
    return frozenset(found._keep_in_fp32_modules or ())


def unsplit_classes(model: nn.Module) -> frozenset[str]:
    """Names of the classes of `model`'s blocks: modules that stay on one device as a whole."""
    _of_models("_no_split_modules")
    found: Any = model
    return frozenset(found._no_split_modules or ())


def no_initial_weights() -> AbstractContextManager[None]:
    """Models built inside it draw no weights."""
    with _needs("models.modeling_utils.no_init_weights"):
        from diffusers.models.modeling_utils import no_init_weights

    context: AbstractContextManager[None] = no_init_weights()
    return context


def at_end_of_call(transformer: nn.Module, callback: Callable[[], None]) -> None:
    """Calls `callback` whenever a pipeline's call with `transformer` ends, for models that pipelines tell so."""
    from diffusers import CacheMixin

    if not hasattr(CacheMixin, "_reset_stateful_cache"):
        raise MovedInterfaceError("CacheMixin._reset_stateful_cache")
    if hasattr(type(transformer), "_reset_stateful_cache"):
        transformer._reset_stateful_cache = partial(_end_call, callback, transformer)  # type: ignore[assignment]


def not_at_end_of_call(transformer: nn.Module) -> None:
    """Takes back what `at_end_of_call` did."""
    transformer.__dict__.pop("_reset_stateful_cache", None)


def _end_call(callback: Callable[[], None], transformer: Any, *args: Any, **kwargs: Any) -> None:
    callback()
    type(transformer)._reset_stateful_cache(transformer, *args, **kwargs)


def execution_device(pipeline: Any) -> torch.device:
    """The device on which `pipeline` runs; its components may wait on another."""
    with _needs("DiffusionPipeline._execution_device"):
        device: torch.device = pipeline._execution_device
    return device


def optional_components(pipeline_class: Any) -> frozenset[str]:
    """Names of the components that a pipeline may be without."""
    with _needs("DiffusionPipeline._optional_components"):
        return frozenset(pipeline_class._optional_components)


def block_streams(block_class: type) -> dict[int, str]:
    """Arguments that the outputs of a transformer block become for the next one, by place in its output.

    Raises:
        ValueError: diffusers' registry does not know the class.
    """
    with _needs("hooks._helpers.TransformerBlockRegistry"):
        from diffusers.hooks._helpers import TransformerBlockRegistry

    for known in block_class.__mro__:  # a sharded model's blocks are of a subclass
        try:
            found = TransformerBlockRegistry.get(known)
        except ValueError:
            continue
        streams = {
            found.return_hidden_states_index: found.hidden_states_argument_name,
            found.return_encoder_hidden_states_index: found.encoder_hidden_states_argument_name,
        }
        return {place: name for place, name in streams.items() if place is not None}
    raise ValueError(f"diffusers' registry of blocks has no {block_class.__name__}")
