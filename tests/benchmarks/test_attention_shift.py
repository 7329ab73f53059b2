"""The table of attention shifts, from a finished study of the small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.attention_shift import main
from tests.errors import raises
from tests.pipeline.small_run import call, small_run


def mean_shift(prompts: list[Any], steps: slice = slice(None)) -> float:
    values = [float(block[0]) for prompt in prompts for step in prompt[steps] for block in step]
    return sum(values) / len(values)


@pytest.mark.ray
@pytest.mark.slow
def test_both_move_the_attention_and_refreshes_bring_it_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"preset": "gptq", "attention": {"density": 0.3, "calibrate": "dense", "residual": {"order": 0}}}
    late = {"density": 0.3, "calibrate": "dense", "dense_steps": 2, "residual": {"order": 1, "rank": 16}}
    study = {
        "study": str(tmp_path / "study"),
        "config": str(small_run(tmp_path)),
        "settings": [
            {"name": "naive", "set": {"method": base}},
            {"name": "corrected", "set": {"method": {**base, "attention": late}}},
        ],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    done = call("study", str(tmp_path / "study.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr

    output = tmp_path / "result.json"
    main([str(tmp_path / "study" / "seed-0"), "--prompts", "1", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == ["quantization", "sparsification", "both, naively", "corrected"]
    for prompts in rows.values():
        assert [[len(step) for step in prompt] for prompt in prompts] == [[9, 9, 9]]
    quantized, sparse, both = (mean_shift(rows[name]) for name in list(rows)[:3])
    assert 1e-6 < quantized < both
    assert 1e-3 < sparse < 1.5 * both
    # Its first two steps run dense: what is left there is the quantization alone.
    assert rows["corrected"][0][:2] == rows["quantization"][0][:2]
    assert mean_shift(rows["corrected"], slice(2, None)) < mean_shift(rows["both, naively"], slice(2, None))
    assert "| both, naively |" in capsys.readouterr().out

    config = tmp_path / "study" / "seed-0" / "corrected" / "checkpoint" / "transformer" / "config.json"
    values = json.loads(config.read_text())
    values["quantization_config"]["sparse_attention"] = None
    config.write_text(json.dumps(values))
    with raises(SystemExit, "corrected", "--naive"):
        main([str(tmp_path / "study" / "seed-0"), "--naive", "corrected", "--output", str(output)])
