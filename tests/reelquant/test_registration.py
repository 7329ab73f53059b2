"""The checkpoint format is known to diffusers; in a process of its own: `test_diffusers_plugin.py`."""

import diffusers.quantizers.auto

import reelquant
from reelquant.diffusers_plugin import ReelquantConfig, ReelquantQuantizer


def test_register_is_idempotent() -> None:
    tables = diffusers.quantizers.auto
    before = len(tables.AUTO_QUANTIZER_MAPPING), len(tables.AUTO_QUANTIZATION_CONFIG_MAPPING)
    reelquant.register()
    reelquant.register()
    assert (len(tables.AUTO_QUANTIZER_MAPPING), len(tables.AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
    assert tables.AUTO_QUANTIZER_MAPPING["reelquant"] is ReelquantQuantizer
    assert tables.AUTO_QUANTIZATION_CONFIG_MAPPING["reelquant"] is ReelquantConfig
