"""The checkpoint format, version 3: what is stored for a quantized layer, and the description in `config.json`.

Tensors of a quantized layer, named `<layer>.<suffix>` relative to the transformer (n outputs, d inputs, b the block of
the rotation):

| suffix | dtype | shape | stored |
|---|---|---|---|
| `weight_packed` | uint8 | `[n, ceil(d / 8) * weight_bits]` | always; bit stream of `quantization.packing.pack_bits` |
| `weight_scale` | float32 | `[n]` | always |
| `group_scale` | uint8 | `[n, ceil(d / 64)]` | layout `two_level`: codes times this are exact INT8 |
| `bias` | the source's | `[n]` | where the source has one |
| `channel_scale` | float32 | `[d]` | leader of a group with a channel scale; the input is divided by it |
| `rotation` | bfloat16 | `[b, b]` | leader of a group with a rotation; applied to every block of b input channels |
| `activation_clip` | float32 | `[1]` | leader of a group with quantized activations; factor on the input's range |

Layers that read the same tensor form a group; its first layer, the leader, holds what the group shares.

Version 2 added `sparse_attention`, `step_protection` and `velocity_correction`, all optional: a file of version 1 is one of
version 2 without them. Version 3 gives first steps as noise levels (`dense_above`, `noise_above`) where version 2 counted them
(`dense_steps`, `num_steps`); `checkpoint.older_versions` translates. Within version 3 `sparse_attention`
may have `refresh_at`, and its `residual` a `gain`; both are left out where they are not used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.checkpoint.inference_specs import StepProtection, VelocityCorrection
from reelquant.checkpoint.older_versions import calibration_steps, translated
from reelquant.noise_schedule import Schedule, shifted_levels
from reelquant.quantization.weight_grid import GROUP_SIZE, WEIGHT_LAYOUTS

FORMAT_VERSION = 3
QUANT_METHOD = "reelquant"
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


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (safetensors' spelling: `F32`, `BF16`, `U8`, …) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

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
        _check_keys("layer specification", values, required=_LAYER_FIELDS, optional=())
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


@dataclass(frozen=True)
class QuantizationSpec:
    """How a transformer is quantized: the `quantization_config` of its `config.json`."""

    bits: str
    """Label such as `W4A6`."""
    method: str
    """Name of the calibration method."""
    layers: dict[str, LayerSpec]
    """By name relative to the transformer; every other layer is stored as in the source."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Where the checkpoint comes from (JSON values)."""
    sparse_attention: SparseAttentionSpec | None = None
    """None for dense attention."""
    step_protection: StepProtection | None = None
    """None where all steps are alike."""
    velocity_correction: VelocityCorrection | None = None
    """None for the transformer's own output."""
    format_version: int = FORMAT_VERSION
    """Version of the format."""

    @property
    def num_steps(self) -> int:
        """Steps of the generations that calibrated it, or 50 where it does not say."""
        return calibration_steps(self.calibration)

    def to_dict(self) -> dict[str, Any]:
        """The specification as JSON values, with `quant_method`, layers sorted by name."""
        layers = {name: self.layers[name].to_dict() for name in sorted(self.layers)}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "bits": self.bits,
            "method": self.method,
            "calibration": self.calibration,
            **{name: None if part is None else part.to_dict() for name, part in self._parts().items()},
            "layers": layers,
        }

    def _parts(self) -> dict[str, SparseAttentionSpec | StepProtection | VelocityCorrection | None]:
        return {
            "sparse_attention": self.sparse_attention,
            "step_protection": self.step_protection,
            "velocity_correction": self.velocity_correction,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, schedule: Schedule = shifted_levels) -> QuantizationSpec:
        """The specification from the JSON values of `to_dict`, of this version of the format or an older one.

        Args:
            schedule: noise levels of a generation by its number of steps, by which older versions are translated.

        Raises:
            ValueError: the format is newer than this package, a key is missing or unknown, or values are not possible;
                all impossible layers are named.
        """
        check_format_version(values.get("format_version"), "quantization_config")
        method = values.get("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(f"quantization_config: quant_method is {method!r}, not {QUANT_METHOD!r}")
        values = {key: value for key, value in values.items() if key != "quant_method"}
        required = ("bits", "method", "layers", "format_version")
        _check_keys("quantization_config", values, required=required, optional=[f.name for f in fields(cls)])
        values = translated(values, schedule)
        parts = {}
        for name, kind in _PARTS.items():
            part = values.get(name)
            if part is not None and not isinstance(part, Mapping):
                raise ValueError(f"quantization_config: {name} is {part!r}, not an object")
            try:
                parts[name] = None if part is None else kind.from_dict(part)
            except (ValueError, TypeError) as error:
                raise ValueError(f"quantization_config: {error}") from None
        return cls(
            **{
                **values,
                **parts,
                "format_version": FORMAT_VERSION,
                "layers": layers_from_dict(values["layers"], "quantization_config"),
            }
        )


_PARTS: dict[str, Any] = {
    "sparse_attention": SparseAttentionSpec,
    "step_protection": StepProtection,
    "velocity_correction": VelocityCorrection,
}


def layers_from_dict(layers: object, where: str) -> dict[str, LayerSpec]:
    """Layer specifications by name from JSON values.

    Raises:
        ValueError: names every layer that is impossible, and every one whose group is.
    """
    if not isinstance(layers, Mapping):
        raise ValueError(f"{where}: layers is {layers!r}, not an object of layer specifications by name")
    parsed, problems = {}, []
    for name, values in layers.items():
        try:
            parsed[name] = LayerSpec.from_dict(values)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if not problems:
        problems = group_problems(parsed)
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return parsed


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


def check_format_version(version: object, where: str) -> None:
    """Refuses a format version that this package does not know.

    Raises:
        ValueError: `version` is not an integer from 1 to `FORMAT_VERSION`.
    """
    if type(version) is not int or version < 1:
        raise ValueError(f"{where}: format_version is {version!r}; it must be an integer from 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version {version} is newer than {FORMAT_VERSION}, the newest that this reelquant reads; "
            "upgrade reelquant, or write the checkpoint again with this version"
        )


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


def layer_digest(tensors: Iterable[tuple[str, TensorInfo, bytes]]) -> str:
    """16 hex digits of a SHA-256 over a layer's tensors.

    `tensors` holds (suffix, dtype and shape, little-endian bytes); the order does not matter, and the bias is left out.
    """
    digest = hashlib.sha256()
    for suffix, info, data in sorted(tensors, key=lambda tensor: tensor[0]):
        if suffix != "bias":
            digest.update(f"{suffix}:{info.dtype}:{','.join(map(str, info.shape))}:{len(data)};".encode())
            digest.update(data)
    return digest.hexdigest()[:16]


def _check_keys(where: str, values: object, *, required: Iterable[str], optional: Iterable[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {values!r} is not an object")
    missing = sorted(set(required) - set(values))
    unknown = sorted(set(values) - set(required) - set(optional))
    wrong = {"missing": missing, "unknown": unknown}
    if problems := [f"{what} keys {', '.join(map(str, keys))}" for what, keys in wrong.items() if keys]:
        raise ValueError(f"{where}: {'; '.join(problems)}")
