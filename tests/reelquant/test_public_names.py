"""Formulas that others call by name: where they are imported from, and their parameters."""

from __future__ import annotations

import inspect
from pkgutil import resolve_name

import pytest

NAMES = {
    "calibration.salience:diffusion_salience": "latents",
    "calibration.salience:quantization_salience": "tokens",
    "calibration.salience:select_salient": "c_diff c_quant num",
    "calibration.token_weights:token_weights": "column_sums lambda_min lambda_max",
    "calibration.attention_distillation:global_attention_loss": "q_fp k_fp q_q k_q stride",
    "calibration.attention_distillation:local_attention_loss": "q_fp k_fp q_q k_q indices",
    "attention.column_sums:attention_column_sums": "q k",
    "attention.residual_cache:ResidualCache": "order rank extrapolation",
    "attention.residual_cache:ResidualCache.refresh": "self step dense sparse",
    "attention.residual_cache:ResidualCache.correct": "self step sparse",
    "quantization.quantizer:fake_quantize": "x bits dim clip",
    "quantization.packing:pack_int4": "w",
    "quantization.packing:unpack_int4": "p",
    "metrics:velocity_sqnr_db": "reference velocity",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_public_formula_has_its_name_and_parameters(name: str) -> None:
    found = resolve_name(f"reelquant.{name}")
    parameters = list(inspect.signature(found).parameters)
    wanted = NAMES[name].split()
    assert parameters[: len(wanted)] == wanted
