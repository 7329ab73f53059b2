"""Which implementation runs on which GPU, from its data alone, and what its kernels take, compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from reelquant.ops import implementation
from reelquant.ops.architecture import INTERPRETER, Architecture, Needs, architecture
from reelquant.ops.eight_bit_attention.op import NEEDS as EIGHT_BIT_ATTENTION
from reelquant.ops.implementation import ANY_GPU, reference_only, takes_int_mm, takes_triton
from reelquant.ops.int8_linear.op import NEEDS as INT8_LINEAR
from tests.errors import raises
from tests.reelquant.ops.conftest import ROOT


def card(name: str, capability: tuple[int, int], kib: int, num: int, *, hip: bool = False) -> Architecture:
    return Architecture.of(name, capability, is_hip=hip, shared_bytes=kib * 1024, num_multiprocessors=num)


CARDS = {
    one.name: one
    for one in (
        card("V100", (7, 0), 96, 80),
        card("A100", (8, 0), 163, 108),
        card("RTX 3090", (8, 6), 99, 82),
        card("RTX 4090", (8, 9), 99, 128),
        card("H100", (9, 0), 227, 132),
        card("B200", (10, 0), 227, 148),
        card("B300", (10, 3), 227, 160),
        card("RTX 5090", (12, 0), 99, 170),
        card("of tomorrow", (13, 0), 227, 200),
        card("MI300X", (9, 4), 64, 304, hip=True),
    )
}
KERNELS = {"int8_linear": INT8_LINEAR, "eight_bit_attention": EIGHT_BIT_ATTENTION, "others": ANY_GPU}
CHOSEN = {
    "V100": ("reference", "full precision", "reference"),
    "A100": ("int_mm", "full precision", "triton"),
    "RTX 3090": ("int_mm", "full precision", "triton"),
    "RTX 4090": ("int_mm", "full precision", "triton"),
    "H100": ("triton", "triton", "triton"),
    "B200": ("int_mm", "full precision", "triton"),
    "B300": ("int_mm", "full precision", "triton"),
    "RTX 5090": ("int_mm", "full precision", "triton"),
    "of tomorrow": ("int_mm", "full precision", "reference"),
    "MI300X": ("reference", "full precision", "reference"),
}
"""Card -> what multiplies INT8, in which precision 8-bit attention runs, and all other operations."""


@pytest.mark.parametrize("name", CARDS)
def test_what_runs_on_a_card(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "architecture", lambda _device: CARDS[name])
    monkeypatch.setattr(implementation, "_has_triton", lambda: True)
    device = torch.device("cuda", 0)
    runs = {op: takes_triton("auto", device, needs=needs) for op, needs in KERNELS.items()}
    linear, attention, others = CHOSEN[name]
    assert runs == {
        "int8_linear": linear == "triton", "eight_bit_attention": attention == "triton", "others": others == "triton"
    }  # fmt: skip
    assert takes_int_mm("auto", device) == (linear != "reference")
    assert not takes_int_mm("reference", device)
    with reference_only():
        assert not takes_int_mm("auto", device)
    for op, needs in KERNELS.items():
        if not runs[op]:
            with raises(ValueError, "triton", CARDS[name].name):
                takes_triton("triton", device, needs=needs)


@pytest.mark.parametrize("found", CARDS.values(), ids=CARDS)
def test_tiles_fit_every_card_that_runs_them(found: Architecture) -> None:
    pytest.importorskip("triton")
    from reelquant.ops.band_attention import launch as band
    from reelquant.ops.column_sums import kernel as column_sums
    from reelquant.ops.int8_linear.launch import choose_config
    from reelquant.ops.residual_factorization.kernel import GRAMS_KIB

    if found.obstacle(ANY_GPU) is None:
        for head_dim in (64, 128):
            for tile in (band.choose_tile(found, head_dim), column_sums.choose_tile(found, head_dim)):
                assert 0 < tile.shared_kib * 1024 <= found.shared_bytes
        assert found.fits(GRAMS_KIB)
    if found.obstacle(INT8_LINEAR) is None:
        for num_tokens in (60, 600, 60_000):
            config = choose_config(num_tokens, 3072, num_multiprocessors=found.num_multiprocessors)
            assert 0 < config.shared_kib <= INT8_LINEAR.shared_kib


def test_shared_memory_counts() -> None:
    needs = Needs(shared_kib=100)
    assert CARDS["A100"].obstacle(needs) is None
    for name in ("RTX 3090", "RTX 5090"):
        obstacle = CARDS[name].obstacle(needs)
        assert obstacle is not None
        assert "100 KiB" in obstacle
        assert "99 KiB" in obstacle


def test_a_layer_keeps_its_multiprocessors_busy() -> None:
    pytest.importorskip("triton")
    from reelquant.ops.int8_linear.launch import LARGE, MEDIUM, choose_config

    # 23 x 12 tiles of 128 x 256: two rounds for 132 multiprocessors, not for 148.
    assert choose_config(2900, 3072, num_multiprocessors=132) is LARGE
    assert choose_config(2900, 3072, num_multiprocessors=148) is MEDIUM


def test_a_cpu_has_the_interpreter() -> None:
    assert architecture(torch.device("cpu")) is INTERPRETER
    assert not takes_int_mm("auto", torch.device("cpu"))


@pytest.mark.gpu
def test_a_gpu_is_found_once() -> None:
    found = architecture(torch.device("cuda", 0))
    assert found is architecture(torch.device("cuda"))
    assert found.capability == torch.cuda.get_device_capability(0)
    assert found.num_multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count
    if found.capability == (9, 0):
        assert found.shared_bytes == 227 * 1024


def check_compiled(capability: int, cases: dict[str, int]) -> None:
    """What a case's kernels take is what is declared, on this version of Triton."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: nothing compiles its kernels")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/reelquant/ops/ahead_of_time.py"), str(capability), *cases],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == cases.keys()
    over = {name: (max(taken), cases[name]) for name, taken in found.items() if max(taken) > cases[name] * 1024}
    assert not over, f"capability {capability}: bytes taken, and KiB declared: {over}"


def declared(kind: str) -> dict[str, int]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: nothing compiles its kernels")
    from tests.reelquant.ops import ahead_of_time

    cases = ahead_of_time.cases_of_hopper() if kind == "hopper" else ahead_of_time.cases_of_all()
    return {name: kib for name, (kib, _) in cases.items()}


def test_what_a_kernel_takes_is_declared() -> None:
    cases = declared("hopper")
    check_compiled(90, {name: cases[name] for name in ("int8_linear small", "int8_linear large")})


@pytest.mark.slow
def test_what_hoppers_kernels_take_is_declared() -> None:
    check_compiled(90, declared("hopper"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_what_the_kernels_of_all_gpus_take_is_declared(capability: int) -> None:
    check_compiled(capability, declared("all"))
