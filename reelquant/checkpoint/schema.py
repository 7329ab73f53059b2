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

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.checkpoint.inference_specs import VelocityCorrection
from reelquant.checkpoint.older_versions import calibration_steps, translated
from reelquant.noise_schedule import Schedule, shifted_levels
from reelquant.quantization.layer_spec import LayerSpec, check_keys, group_problems
from reelquant.settings.generation import StepProtection

FORMAT_VERSION = 3
QUANT_METHOD = "reelquant"


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
        check_keys("quantization_config", values, required=required, optional=[f.name for f in fields(cls)])
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
