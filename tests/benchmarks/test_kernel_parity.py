"""The small model's videos over fused blocks and without, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kernel_parity import YARDSTICKS, main


@pytest.mark.slow
def test_fused_blocks_change_no_more_than_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    main(["--device", "cpu", "--prompts", "1", "--steps", "2", "--interval", "1", "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["dense", "sparse, 25 %", "sparse, 25 %, 8-bit attention"]
    for result in results.values():
        (row,) = result["videos"]
        assert row["passes"]
        assert all(row[name] > 25 for name in ("kernels", *YARDSTICKS))
    assert "| sparse, 25 % |" in capsys.readouterr().out
