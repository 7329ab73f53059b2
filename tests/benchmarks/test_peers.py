import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from benchmarks.peers.__main__ import main, summary
from benchmarks.peers.adapters import block_linears
from benchmarks.peers.measurement import ERROR_CHARACTERS, Task, package_version, run_task, shortened
from benchmarks.peers.results import is_done, our_rows, table
from benchmarks.peers.roster import PEERS, REFERENCE
from benchmarks.peers.sizes import transformer_sizes
from tests.errors import names, raises

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"blocks.0.to_q": (6, 10), "blocks.0.proj_out": (3, 8)}


def task(folder: Path) -> Task:
    return Task("bfloat16", 0, "model", {}, (), (), None, "float32", 1, str(folder / "r"), str(folder / "found.json"))


STATE = {
    "embedder.weight": torch.zeros(7, 3, dtype=torch.bfloat16),
    "blocks.0.to_q.weight": torch.zeros(6, 10, dtype=torch.int8),
    "blocks.0.to_q.scale": torch.zeros(6, 2),
    "blocks.0.to_q.bias": torch.zeros(6, dtype=torch.bfloat16),
    "blocks.0.to_q._extra_state": {"no": "tensor"},
    "blocks.0.proj_out.weight": torch.zeros(3, 8, dtype=torch.bfloat16),
    "blocks.0.proj_out.bias": torch.zeros(3, dtype=torch.bfloat16),
}


class TestSizes:
    def test_everything_is_counted_once(self) -> None:
        sizes = transformer_sizes(STATE, SHAPES)
        assert sizes.transformer_bytes == 7 * 3 * 2 + 60 + 12 * 4 + 6 * 2 + 24 * 2 + 3 * 2
        assert sizes.packed_transformer_bytes == sizes.transformer_bytes
        assert sizes.bits_per_weight == sizes.packed_bits_per_weight == 8 * (60 + 48) / 60
        assert (sizes.num_quantized, sizes.num_linears) == (1, 2)
        assert sizes.quantized_weight_frac == 60 / 84

    def test_wider_storage_is_counted_packed_too(self) -> None:
        sizes = transformer_sizes(STATE, SHAPES, value_bits=4)
        assert sizes.transformer_bytes - sizes.packed_transformer_bytes == 30
        assert sizes.packed_bits_per_weight == 8 * (30 + 48) / 60

    def test_simulated_weights_are_seen_by_their_scale(self) -> None:
        state = {"blocks.0.to_q.weight": torch.zeros(6, 10), "blocks.0.to_q.weight_quantizer._amax": torch.zeros(6, 1)}
        sizes = transformer_sizes(state, {"blocks.0.to_q": (6, 10)}, value_bits=8)
        assert (sizes.bits_per_weight, sizes.packed_bits_per_weight) == (8 * (240 + 24) / 60, 8 * (60 + 24) / 60)

    def test_tensors_inside_a_subclass_are_counted(self) -> None:
        inside = TwoTensor(torch.zeros(6, 10, dtype=torch.int8), torch.zeros(6, 10, dtype=torch.int8))
        sizes = transformer_sizes({"blocks.0.to_q.weight": inside}, {"blocks.0.to_q": (6, 10)})
        assert sizes.transformer_bytes == 120
        assert sizes.bits_per_weight == 16

    def test_a_tool_that_quantized_nothing_is_refused(self) -> None:
        plain = {f"{name}.weight": torch.zeros(shape) for name, shape in SHAPES.items()}
        with raises(ValueError, 2, "blocks.0.to_q"):
            transformer_sizes(plain, SHAPES)

    def test_a_linear_without_tensors_is_refused(self) -> None:
        del (state := dict(STATE))["blocks.0.proj_out.weight"]
        with raises(ValueError, 1, "blocks.0.proj_out"):
            transformer_sizes(state, SHAPES)


def test_only_linears_inside_the_blocks_are_offered() -> None:
    linear = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"proj_out": linear, "context_embedder": torch.nn.ModuleList([linear])})
    model["transformer_blocks"] = torch.nn.ModuleList([torch.nn.ModuleDict({"proj_out": torch.nn.Linear(2, 2)})])
    model["single_transformer_blocks"] = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert block_linears(model) == ("transformer_blocks.0.proj_out", "single_transformer_blocks.0")


class TestProcesses:
    def test_a_crash_is_an_error_with_its_signal(self, tmp_path: Path) -> None:
        crash = "import ctypes, sys; print('about to crash', file=sys.stderr, flush=True); ctypes.string_at(0)"
        found = run_task(task(tmp_path), timeout_s=60, command=[sys.executable, "-c", crash])
        assert names(found.pop("error"), "SIGSEGV", "about to crash")
        assert not found

    def test_a_result_of_before_the_crash_is_not_taken(self, tmp_path: Path) -> None:
        (tmp_path / "found.json").write_text('{"psnr_db": [40.0]}')
        found = run_task(task(tmp_path), timeout_s=60, command=[sys.executable, "-c", "raise SystemExit('no')"])
        assert names(found.pop("error"), "status 1", "no")
        assert not found

    def test_a_hang_is_an_error(self, tmp_path: Path) -> None:
        found = run_task(task(tmp_path), timeout_s=0.5, command=[sys.executable, "-c", "import time; time.sleep(60)"])
        assert names(found["error"], "0 s")

    def test_long_messages_are_one_short_line(self) -> None:
        message = shortened(f"{ROOT}/benchmarks/x.py:\n  " + "word " * 200)
        assert message.startswith("benchmarks/x.py: word")
        assert len(message) == ERROR_CHARACTERS
        assert "\n" not in message


def entry(psnr: list[float], **more: Any) -> dict[str, Any]:
    sizes = {"transformer_bytes": 500, "packed_transformer_bytes": 300, "bits_per_weight": 8.5}
    sizes |= {"packed_bits_per_weight": 4.5, "num_quantized": 7, "num_linears": 9}
    measured = {"psnr_db": psnr, "ssim": [0.5] * len(psnr), "recognized": [True] * len(psnr), "sizes": sizes}
    return measured | {"fingerprint": {"versions": "1"}} | more


DOCUMENT = {
    "peers": {
        "full_precision": {"seeds": {"0": {"recognized": [True, False], "sizes": {"transformer_bytes": 900}}}},
        "torchao-w4": {"seeds": {"0": entry([30.0, 34.0]), "1": entry([36.0, 38.0])}},
        "quanto-w4": {"seeds": {"0": entry([40.0, 20.0]), "1": {"error": "RuntimeError: a | b"}}},
        "bnb-nf4": {"seeds": {"0": {"error": "ValueError: not here"}}},
    }
}


class TestResults:
    def test_done_is_what_would_be_the_same_again(self) -> None:
        assert is_done(entry([1.0]), {"versions": "1"})
        assert not is_done(entry([1.0]), {"versions": "2"})
        assert not is_done({"error": "x", "fingerprint": {"versions": "1"}}, {"versions": "1"})
        assert not is_done(None, {"versions": "1"})

    def test_means_are_over_seeds(self) -> None:
        found = summary(DOCUMENT)["torchao-w4"]
        assert found["psnr_db_mean"] == 34.5
        assert found["psnr_db_sd"] == pytest.approx(12.5**0.5)
        assert found["psnr_db_worst"] == 30.0
        assert found["compression"] == 1.8
        assert found["packed_compression"] == 3.0

    def test_table_says_what_was_and_what_could_not_be_measured(self) -> None:
        lines = table(summary(DOCUMENT)).splitlines()
        assert len({line.count("|") for line in lines[:5]}) == 1
        assert lines[2].startswith("| full_precision | - | - | - | - | - | 50.0 % | - | 16 bits | - | 2 |")
        assert lines[3] == (
            "| torchao-w4 | int4, group 64 | - | 34.50 ± 3.54 | 30.00 | 0.5000 | 100.0 % | 4.50 (kept in 8.50) | "
            "3.00× smaller (as kept: 1.80×) | 7 of 9 | 4 |"
        )
        assert lines[4].startswith("| quanto-w4 | int4, group 96 or 128 | - | 30.00 | 20.00 |")
        assert lines[-2:] == [
            "| quanto-w4 | `quantize(weights=qint4)` | RuntimeError: a \\| b |",
            "| bnb-nf4 | `nf4, double quantization` | ValueError: not here |",
        ]

    def test_our_own_rows_come_from_the_recorded_presets(self) -> None:
        recorded = json.loads((ROOT / "benchmarks/results/presets.json").read_bytes())
        rows = our_rows(recorded)
        assert "**reelquant** `s2q`" in rows
        assert len(rows) == len(recorded["summary"]) - 1
        assert all(row["compression"] > 1 and row["num_videos"] > 0 for row in rows.values())
        assert "**reelquant** `s2q`" in table(rows)


def test_every_row_has_a_setting_and_runs_4_bits_first() -> None:
    assert REFERENCE.name not in PEERS
    assert all(peer.setting and peer.weights for peer in PEERS.values())
    is_8_bits = [peer.weights.startswith("int8") for peer in PEERS.values()]
    assert is_8_bits == sorted(is_8_bits)


@pytest.mark.slow
def test_benchmark_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row that needs torch only is measured, recorded, and kept; a tool that is not installed says how to get it."""
    if package_version("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed: its row would be measured")
    output = tmp_path / "peers.json"
    monkeypatch.chdir(ROOT)
    short = ["generation.num_inference_steps=2", "generation.num_frames=5", "prompts.num_held_out=1"]
    overrides = [word for override in short for word in ("--set", override)]
    command = ["peers", "--seeds", "0", "--peers", "bfloat16", "bnb-nf4", "--work", str(tmp_path / "work"), *overrides]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    main()
    document = json.loads(output.read_bytes())
    (reference,) = document["peers"]["full_precision"]["seeds"].values()
    (bfloat16,) = document["peers"]["bfloat16"]["seeds"].values()
    (missing,) = document["peers"]["bnb-nf4"]["seeds"].values()
    assert "psnr_db" not in reference
    assert len(reference["recognized"]) == 1
    assert 20 < bfloat16["psnr_db"][0] < 70
    assert bfloat16["dtype"] == "bfloat16"
    assert bfloat16["sizes"]["transformer_bytes"] == reference["sizes"]["transformer_bytes"] == 2 * 8862752
    assert names(missing["error"], "ValueError", "bitsandbytes", "pip install -e '.[application,peers]'")
    assert f"| bnb-nf4 | `nf4, double quantization` | {missing['error'][:30]}" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*command[:4], "bfloat16", *command[6:], "--output", str(output)])
    (tmp_path / "work").rename(tmp_path / "gone")
    main()
    assert json.loads(output.read_bytes())["peers"] == document["peers"]
    assert not (tmp_path / "work").exists()
