"""A whole generation of a tiny random model through diffusers' pipeline, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.generation_time import BASELINE, OURS, main
from tests.errors import names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_both_sides_of_a_small_generation(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    main(["--device", "cpu", "--small", "--steps", "10", "--baseline-steps", "1", "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert [len(results[case]["steps_s"]) for case in (BASELINE, OURS)] == [1, 10]
    for row in results.values():
        assert row["total_s"] == pytest.approx(50 * row["mean_step_s"] + row["decode_s"])
        assert row["call_s"] == pytest.approx(sum(row["steps_s"]) + row["decode_s"])


def test_steps_without_a_refresh_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "9", "--output", str(tmp_path / "result.json")])
    assert names(capsys.readouterr().err, "--steps", 10)
