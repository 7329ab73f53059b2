import json
from pathlib import Path

import pytest

from benchmarks.distillation_time import KINDS, main, projection, table

SMALL = [
    "--frames",
    "2",
    "--height",
    "3",
    "--width",
    "4",
    "--text",
    "3",
    "--heads",
    "1",
    "--samples",
    "1",
    "--epochs",
    "1",
]


@pytest.mark.slow
def test_every_share_of_the_tokens_is_measured_with_every_term(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deeper" / "result.json"
    main([
        *SMALL, "--device", "cpu", "--terms", "none", "both", "--tokens-per-step", "1.0", "0.5", "--output", str(output)
    ])  # fmt: skip
    document = json.loads(output.read_bytes())
    assert document["settings"]["tokens_per_step"] == [1.0, 0.5]
    assert list(document["results"]) == list(document["projected_s"]) == ["none", "both"]
    for terms, fractions in document["results"].items():
        assert list(fractions) == list(document["projected_s"][terms]) == ["1.0", "0.5"]
        for rows in fractions.values():
            assert list(rows) == list(KINDS)
            assert all(row["step_s"] > 0 and row["targets_s"] > 0 for row in rows.values())
    printed = capsys.readouterr().out
    assert printed.count("| 50 % |") == 2 * (2 + 1)
    assert printed.count("| none | all | double |") == 1


def test_the_projection_counts_targets_once_and_steps_every_epoch() -> None:
    rows = {"double": {"targets_s": 1.0, "step_s": 0.1}, "single": {"targets_s": 2.0, "step_s": 0.01}}
    config = {"num_layers": 3, "num_single_layers": 5}
    assert projection(rows, config, samples=2, epochs=10) == pytest.approx(3 * 2 * (1 + 1) + 5 * 2 * (2 + 0.1))


def test_changes_are_to_all_tokens_without_terms() -> None:
    row = {"targets_s": 1.0, "step_s": 0.5, "peak_bytes": 2**31}
    results = {"none": {"1.0": {"double": row}, "0.25": {"double": row}}}
    shown = table({"results": results, "projected_s": {"none": {"1.0": 7200.0, "0.25": 3600.0}}})
    assert "| none | all | double | 1.000 | 0.500 | 2.0 |" in shown
    assert "| none | all | 2.00 | - |" in shown
    assert "| none | 25 % | 1.00 | -50.0 % |" in shown
