"""The checkpoint format is known to diffusers whatever is imported first, and nobody loads torch for it."""

import subprocess
import sys

import diffusers.quantizers.auto

import reelquant
from reelquant.diffusers_plugin import ReelquantConfig, ReelquantQuantizer

FRESH_PROCESS = """
import sys
import reelquant
assert not {"torch", "diffusers"} & sys.modules.keys()
from reelquant.diffusers_plugin import ReelquantConfig, ReelquantQuantizer  # imports the tables, which ask for it
from diffusers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["reelquant"] is ReelquantQuantizer
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["reelquant"] is ReelquantConfig
"""


def test_in_a_fresh_process() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_register_is_idempotent() -> None:
    tables = diffusers.quantizers.auto
    before = len(tables.AUTO_QUANTIZER_MAPPING), len(tables.AUTO_QUANTIZATION_CONFIG_MAPPING)
    reelquant.register()
    reelquant.register()
    assert (len(tables.AUTO_QUANTIZER_MAPPING), len(tables.AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
    assert tables.AUTO_QUANTIZER_MAPPING["reelquant"] is ReelquantQuantizer
    assert tables.AUTO_QUANTIZATION_CONFIG_MAPPING["reelquant"] is ReelquantConfig
