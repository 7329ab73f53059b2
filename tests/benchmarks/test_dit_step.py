"""The schedule of the denoising-step benchmark, its kernel table, and which results may share a file."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.dit_step.kernel_table import class_of, profiles
from benchmarks.dit_step.record import kept_results
from benchmarks.dit_step.schedule import COMPUTED, MEASURED, fewest_steps, mean_step, step_kinds
from reelquant.attention.sparse_spec import SparseAttentionSpec, dense_threshold
from reelquant.noise_schedule import shifted_levels
from tests.errors import raises

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "dit_step.json"
SPEC = SparseAttentionSpec(density=0.15, online=True, interval=5)
WARMED = replace(SPEC, dense_above=dense_threshold(5, shifted_levels(50), refreshes=True))
SECONDS = {"dense": 5.0, "first refresh": 6.0, "first sparse": 1.0, "refresh": 7.0, "sparse": 2.0}


def test_schedules_have_the_kinds_of_their_specification() -> None:
    assert step_kinds(SPEC, 7) == ["first refresh", *["first sparse"] * 4, "refresh", "sparse"]
    kinds = step_kinds(WARMED, 50)
    assert kinds[:6] == [*["dense"] * 4, "first refresh", "first sparse"]
    assert Counter(kinds) == {"dense": 4, "first refresh": 1, "first sparse": 4, "refresh": 9, "sparse": 32}


@pytest.mark.parametrize("spec", [SPEC, WARMED])
def test_fewest_steps_give_the_mean_of_the_whole(spec: SparseAttentionSpec) -> None:
    seconds = [SECONDS[kind] for kind in step_kinds(spec, 50)]
    whole, how = mean_step(seconds, spec)
    assert how == MEASURED
    assert step_kinds(spec, fewest_steps(spec) + 1)[-1] == "refresh"
    mean, how = mean_step(seconds[: fewest_steps(spec)], spec)
    assert mean == pytest.approx(whole)
    assert how == COMPUTED
    with raises(ValueError, "refresh, sparse", fewest_steps(spec)):
        mean_step(seconds[: fewest_steps(spec) - 6], spec)


def test_recorded_kernels_stay_below_their_ceilings() -> None:
    document = json.loads(RECORD.read_text())
    found = profiles(document)
    assert found
    for (case, _step), rows in found.items():
        result = document["results"][case]
        assert sum(row.share for row in rows) == pytest.approx(1, abs=1e-3)  # classes of less than 0.05 ms are left out
        slowest = max(result["steps_s"]) * 1e3
        assert all(0 < row.ms < slowest for row in rows)
        shares = {row.name: row.of_ceiling for row in rows if row.of_ceiling is not None}
        assert {"dense attention", "INT8 products"} & set(shares) or not case.startswith("ours")
        # A packed weight may still lie in the L2 cache, which is faster than any copy: up to 2 % were seen.
        assert all(0.05 < share < 1.05 for share in shares.values()), (case, shares)


def test_classes_are_told_by_name() -> None:
    assert class_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16") == "dense attention"
    assert class_of("band_attention_kernel") == "band attention"
    assert class_of("nvjet_sm90_tss_256x8_64x6_4x1_v_bz_TNT") == "16-bit or FP8 products"
    assert class_of("cutlass_80_tensorop_d884gemm_64x64_16x3_tn_align1") == "factorization"
    assert class_of("Memcpy DtoD (Device -> Device)") == "copies and the rest"


def test_only_like_results_share_a_file(tmp_path: Path) -> None:
    document = json.loads(RECORD.read_text())
    device, settings = document["environment"]["device"], document["settings"]
    assert kept_results(RECORD, device, settings) == document["results"]
    assert kept_results(tmp_path / "none.json", device, settings) == {}
    with raises(ValueError, RECORD, "rank", 16, 32, "device", "other", "--output"):
        kept_results(RECORD, "other", settings | {"rank": 32})
