"""From the configuration's bits to every linear layer's, and to the bytes they take."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping

from pipeline.config.loading import ConfigError
from pipeline.config.schema import BitsConfig
from reelquant.calibration.input_groups import block_calls
from reelquant.families.family import Config, Family
from reelquant.settings.generation import LayerBits


def layer_kinds(family: Family, config: Config, layers: Iterable[str]) -> dict[str, str]:
    """`block`, `modulation`, `refiner` or `embedder` of every linear layer that can be quantized, in model order."""
    kinds: dict[str, str] = {}
    for block, call in block_calls(family, config).items():
        for group in (group for level in call.levels for group in level):
            kind = "modulation" if group.stream == "conditioning" else "block"
            kinds.update({f"{block}.{layer}": kind for layer in group.layers})
    outside = {name: family.auxiliary_kind(name) for name in layers}
    kinds.update({name: kind for name, kind in outside.items() if kind is not None})
    return kinds


def resolve_bits(bits: BitsConfig, kinds: Mapping[str, str]) -> dict[str, LayerBits]:
    """Bits by full layer name; layers at 16 weight bits are left out.

    Raises:
        ConfigError: a pattern matches no layer (all such patterns at once), or no layer is quantized.
    """
    defaults = {
        "block": LayerBits(bits.weight, bits.activation),
        "modulation": bits.modulation,
        "refiner": bits.refiner,
        "embedder": bits.embedder,
    }
    resolved = {name: defaults[kind] for name, kind in kinds.items()}
    problems = []
    for exception in bits.exceptions:
        matched = fnmatch.filter(kinds, exception.pattern)
        if not matched:
            problems.append(
                f"bits.exceptions: pattern {exception.pattern!r} matches no layer; layers are named like "
                f"{', '.join(list(kinds)[:3])} … {list(kinds)[-1]}"
            )
        resolved.update(dict.fromkeys(matched, LayerBits(exception.weight, exception.activation)))
    quantized = {name: layer for name, layer in resolved.items() if layer.weight < 16}
    if not quantized:
        problems.append(
            "bits.exceptions: they leave every layer in 16 bits, so nothing is quantized: take a pattern back, or give it "
            "fewer bits"
        )
    if problems:
        raise ConfigError(problems)
    return quantized


def bits_label(bits: Mapping[str, LayerBits], kinds: Mapping[str, str]) -> str:
    """The bits of the linears inside the blocks, such as `W4A6`.

    What differs is said behind a comma: `W4A6, modulation W8` (weight bits of the AdaLN layers, which read one row a forward in
    16 bits), `W4A6, 3 of 340 layers W8A8` (exceptions). Layers outside the blocks are not part of it.

    Args:
        bits: of the quantized layers, as `resolve_bits` gives them.
        kinds: as `layer_kinds` gives them.
    """
    found = {
        kind: Counter(bits.get(name, LayerBits(16, 16)) for name, other in kinds.items() if other == kind)
        for kind in ("block", "modulation")
    }
    usual = found["block"].most_common(1)[0][0]
    others = {layer: num for layer, num in found["block"].items() if layer != usual}
    parts = [f"W{usual.weight}A{usual.activation}"]
    if others:
        widths = "/".join(sorted(f"W{layer.weight}A{layer.activation}" for layer in others))
        parts.append(f"{sum(others.values())} of {found['block'].total()} layers {widths}")
    modulation = sorted({layer.weight for layer in found["modulation"]})
    if modulation and modulation != [usual.weight]:
        parts.append(f"modulation {'/'.join(f'W{weight}' for weight in modulation)}")
    return ", ".join(parts)


def group_conflicts(family: Family, config: Config, bits: Mapping[str, LayerBits]) -> list[str]:
    """Input groups whose layers are to have different activation bits: they read one tensor, which is quantized once."""
    problems = []
    for block, call in block_calls(family, config).items():
        for group in (group for level in call.levels for group in level):
            names = [f"{block}.{layer}" for layer in group.layers if f"{block}.{layer}" in bits]
            found = {bits[name].activation for name in names}
            if len(found) > 1:
                problems.append(
                    f"bits: {', '.join(names)} read one tensor and need the same activation bits, not {sorted(found)}: "
                    "widen the pattern of the exception to the whole group"
                )
    return problems
