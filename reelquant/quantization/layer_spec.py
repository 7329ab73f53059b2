"""How one linear layer is quantized, and the tensors that it and its group have.

n outputs, d inputs, b the block of the rotation; `reelquant.checkpoint.schema` has the table of suffixes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from reelquant.quantization.weight_grid import GROUP_SIZE, WEIGHT_LAYOUTS

LAYER_SUFFIXES = ("weight_packed", "weight_scale", "group_scale", "channel_scale", "rotation", "activation_clip")
"""Every suffix but `bias`, which is an ordinary tensor of the model: these keep their dtype whatever the model's is."""
GROUP_SUFFIXES = ("channel_scale", "rotation", "activation_clip")
"""What the layers of a group share: stored with its leader, copied into each of them when a model is loaded."""
DTYPES = {
    "weight_packed": "U8",
    "weight_scale": "F32",
    "group_scale": "U8",
    "channel_scale": "F32",
    "rotation": "BF16",
    "activation_clip": "F32",
}
"""Dtype of each suffix, in safetensors' spelling."""
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtype by safetensors' spelling."""
_SPELLINGS = {dtype: spelling for spelling, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (safetensors' spelling: `F32`, `BF16`, `U8`, …) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """Dtype and shape of a tensor in memory.

        Raises:
            ValueError: tensors of this dtype are not stored.
        """
        if tensor.dtype not in _SPELLINGS:
            raise ValueError(f"dtype {tensor.dtype} cannot be stored; possible are {sorted(TORCH_DTYPES)}")
        return cls(_SPELLINGS[tensor.dtype], tuple(tensor.shape))

    @property
    def num_bytes(self) -> int:
        """Length of the data; `dtype` is among `TORCH_DTYPES`."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class LayerSpec:
    """How one linear layer is quantized."""

    weight_bits: int
    """2 to 8."""
    activation_bits: int
    """4 to 8, or 16: not quantized."""
    weight_layout: str
    """`per_channel` or `two_level`."""
    group: str
    """Full name of the layer that holds the group's tensors: the leader, which names itself."""
    channel_scale: bool
    """Whether the group's input is divided by a channel scale."""
    rotation: int
    """Block size of the group's rotation, 0 for none."""
    digest: str
    """16 hex digits of a SHA-256 over the layer's own tensors but the bias (`layer_digest`)."""

    def __post_init__(self) -> None:
        problems = []
        for name, kind in _LAYER_FIELDS.items():
            value = getattr(self, name)
            if type(value) is not kind:
                problems.append(f"{name} is {value!r}, not of type {kind.__name__}")
        if problems:
            raise ValueError(f"layer specification: {'; '.join(problems)}")
        if not 2 <= self.weight_bits <= 8:
            problems.append(f"weight_bits is {self.weight_bits}; 2 to 8 are possible")
        if not (4 <= self.activation_bits <= 8 or self.activation_bits == 16):
            problems.append(f"activation_bits is {self.activation_bits}; 4 to 8, or 16 for none, are possible")
        if self.weight_layout not in WEIGHT_LAYOUTS:
            problems.append(f"weight_layout is {self.weight_layout!r}; {WEIGHT_LAYOUTS} are possible")
        if self.rotation < 0 or self.rotation & (self.rotation - 1):
            problems.append(f"rotation is {self.rotation}; 0 or a power of two is possible")
        if problems:
            raise ValueError(f"layer specification: {'; '.join(problems)}")

    def to_dict(self) -> dict[str, Any]:
        """The specification as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerSpec:
        """The specification from JSON values.

        Raises:
            ValueError: a key is missing or unknown, or a value is not possible.
        """
        check_keys("layer specification", values, required=_LAYER_FIELDS, optional=())
        return cls(**values)

    def shares_input_with(self, leader: LayerSpec) -> bool:
        """Whether a group whose leader is described by `leader` can have this layer as a member."""
        return (self.activation_bits, self.channel_scale, self.rotation) == (
            leader.activation_bits,
            leader.channel_scale,
            leader.rotation,
        )


_LAYER_FIELDS: dict[str, type] = {
    "weight_bits": int,
    "activation_bits": int,
    "weight_layout": str,
    "group": str,
    "channel_scale": bool,
    "rotation": int,
    "digest": str,
}


def group_problems(layers: Mapping[str, LayerSpec]) -> list[str]:
    """What is wrong with the layers' groups: leaders that are missing, do not lead, or are quantized differently."""
    problems = []
    for name, spec in layers.items():
        leader = layers.get(spec.group)
        if leader is None:
            problems.append(f"{name}: its group's leader {spec.group!r} is not among the layers")
        elif leader.group != spec.group:
            problems.append(f"{name}: its group's leader {spec.group!r} belongs to the group of {leader.group!r}")
        elif not spec.shares_input_with(leader):
            problems.append(
                f"{name}: activation_bits, channel_scale or rotation are not those of its group's leader {spec.group!r}"
            )
    return problems


def layer_tensors(name: str, spec: LayerSpec, *, in_features: int, out_features: int) -> dict[str, TensorInfo]:
    """Dtypes and shapes of the tensors that layer `name` stores besides its bias, by suffix."""
    shapes: dict[str, tuple[int, ...]] = {
        "weight_packed": (out_features, -(-in_features // 8) * spec.weight_bits),
        "weight_scale": (out_features,),
    }
    if spec.weight_layout == "two_level":
        shapes["group_scale"] = (out_features, -(-in_features // GROUP_SIZE))
    own = {suffix: TensorInfo(DTYPES[suffix], shape) for suffix, shape in shapes.items()}
    return own | group_tensors(spec, in_features=in_features) if spec.group == name else own


def group_tensors(spec: LayerSpec, *, in_features: int) -> dict[str, TensorInfo]:
    """Dtypes and shapes of the tensors that a layer shares with its group, by suffix."""
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.channel_scale:
        shapes["channel_scale"] = (in_features,)
    if spec.rotation:
        shapes["rotation"] = (spec.rotation, spec.rotation)
    if spec.activation_bits < 16:
        shapes["activation_clip"] = (1,)
    return {suffix: TensorInfo(DTYPES[suffix], shape) for suffix, shape in shapes.items()}


def layer_digest(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of a SHA-256 over a layer's tensors by suffix; their order does not matter, and the bias is left out."""
    digest = hashlib.sha256()
    for suffix, tensor in sorted(tensors.items()):
        if suffix != "bias":
            info = TensorInfo.of(tensor)
            digest.update(f"{suffix}:{info.dtype}:{','.join(map(str, info.shape))}:{info.num_bytes};".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def check_keys(where: str, values: object, *, required: Iterable[str], optional: Iterable[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {values!r} is not an object")
    missing = sorted(set(required) - set(values))
    unknown = sorted(set(values) - set(required) - set(optional))
    wrong = {"missing": missing, "unknown": unknown}
    if problems := [f"{what} keys {', '.join(map(str, keys))}" for what, keys in wrong.items() if keys]:
        raise ValueError(f"{where}: {'; '.join(problems)}")
