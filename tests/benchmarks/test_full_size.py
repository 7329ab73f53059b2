"""The benchmark of the whole pipeline, with sizes that a CPU takes: every part is called, and the record fits together."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.full_size.__main__ import main, write_record
from benchmarks.full_size.figures import STAGES, speed_up
from benchmarks.full_size.tables import table
from tests.errors import names
from tests.pipeline.small_run import Recorded

TRANSFORMER = ["num_attention_heads=1", "num_layers=1", "num_single_layers=2", "text_embed_dim=128"]
SMALL = ["--transformer", *TRANSFORMER, "--vae", "block_out_channels=[32, 64, 128, 128]"]
SHORT = ["--video", "48x64x5", "--steps", "2", "--samples", "2", "--segment-length", "1", "--threads", "1"]


def runs_of(output: Path) -> dict[str, Any]:
    runs: dict[str, Any] = json.loads(output.read_text())["runs"]
    return runs


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_part_of_a_small_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output, folder = tmp_path / "deeper" / "result.json", tmp_path / "work"
    main([*SMALL, *SHORT, "--folder", str(folder), "--output", str(output)])
    [(label, record)] = runs_of(output).items()
    assert label == "48p fsdp"
    parts, stages = record["parts"], record["stages"]
    assert list(parts) == ["model", "plan", "activations", "warm", "distillation", "load", "alone"]
    assert not [part for part in parts.values() if "error" in part or "stopped" in part]
    assert (folder / "model" / "model_index.json").is_file()
    assert tuple(stages) == STAGES
    assert {name: stage["units"] for name, stage in stages.items()} == {
        "trajectories": 2, "selection": 1, "activations": 2, "distillation": 4, "assembly": 1,
    }  # fmt: skip
    for name, stage in stages.items():
        assert stage["units"] == stage["planned_units"]
        assert stage["failed_attempts"] == 0
        assert stage["sum_s"] == pytest.approx(sum(stage["unit_s"].values()))
        if stage["planned_bytes"]:
            assert stage["output_bytes"] == pytest.approx(stage["planned_bytes"], rel=0.05), name
    assert stages["trajectories"]["output_bytes"] == stages["trajectories"]["planned_bytes"]
    assert stages["assembly"]["transformer_bytes"] == stages["assembly"]["planned_transformer_bytes"]
    assert parts["load"]["quantized_layers"] > 20
    assert len(parts["load"]["steps_s"]) == 2
    assert record["speed_up"]["how"] == "measured"
    assert record["speed_up"]["same_bytes"]
    assert record["speed_up"]["workers"] == 2
    store = record["store"]
    assert store["bytes"] == stages["activations"]["output_bytes"]
    assert store["activations_s"] == pytest.approx(stages["activations"]["sum_s"])
    assert 0 <= store["wait_frac"] < 1
    # Two samples in front of three segments are all streams: the rest are two timestep embeddings, and metadata.
    assert 0.5 * store["bytes"] < store["entry_bytes"] < store["bytes"]
    assert record["failures"] == []
    shown = capfd.readouterr().out
    assert "| 48p fsdp | 2 workers |" in shown
    assert table(json.loads(output.read_text())) in shown

    # Had the time been up after two units:
    for unit in ("reelquant-segment-001", "reelquant-auxiliary"):
        Recorded(folder / "alone").remove("distillation", unit)
    found = speed_up(folder / "run", folder / "alone")
    assert found is not None
    assert found["how"] == "projected from 2 of 4 units"
    assert found["alone_wall_s"] == pytest.approx(record["speed_up"]["alone_wall_s"], rel=2)
    for unit in Recorded(folder / "alone").units("distillation"):
        Recorded(folder / "alone").remove("distillation", unit)
    assert speed_up(folder / "run", folder / "alone") is None

    # A second call goes on in the folder: everything is done, and another run stands beside the first.
    main(
        [
            *SMALL,
            *SHORT,
            "--folder",
            str(folder),
            "--output",
            str(output),
            "--label",
            "again",
            "--parts",
            "model",
            "load",
        ]
    )
    again = runs_of(output)
    assert list(again) == ["48p fsdp", "again"]
    assert again["48p fsdp"] == record
    assert not again["again"]["parts"]["model"]["written"]
    assert again["again"]["stages"] == stages
    assert again["again"]["speed_up"] is None
    with pytest.raises(SystemExit):
        main(
            [
                *SMALL,
                "--vae",
                "layers_per_block=1",
                *SHORT,
                "--folder",
                str(folder),
                "--output",
                str(output),
                "--parts",
                "model",
            ]
        )
    assert names(runs_of(output)["48p fsdp"]["parts"]["model"]["error"], folder)


@pytest.mark.slow
def test_a_part_that_fails_is_recorded_and_ends_what_needs_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    with pytest.raises(SystemExit):
        main([*SMALL, *SHORT, "--video", "50x64x5", "--parts", "model", "plan", "activations", "--output", str(output)])
    parts = runs_of(output)["50p fsdp"]["parts"]
    assert list(parts) == ["model", "plan"]
    assert names(parts["plan"]["error"], "exit code 1", "pipeline plan")
    assert names(capfd.readouterr().out, "generation.height", 50)
    assert parts["plan"]["error"] in table(json.loads(output.read_text()))


@pytest.mark.slow
def test_no_time_is_left(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    with pytest.raises(SystemExit):
        main([*SMALL, *SHORT, "--parts", "model", "plan", "load", "--budget-s", "0.001", "--output", str(output)])
    parts = runs_of(output)["48p fsdp"]["parts"]
    assert list(parts) == ["model", "plan"]
    assert names(parts["plan"]["stopped"], "pipeline plan")


def test_a_record_keeps_the_runs_of_other_labels(tmp_path: Path) -> None:
    path, record = tmp_path / "result.json", {"environment": {"date": "1"}, "parts": {}}
    later = copy.deepcopy(record) | {"environment": {"date": "2"}}
    write_record(path, "one", record)
    write_record(path, "two", record)
    write_record(path, "one", later)
    assert json.loads(path.read_text()) == {"environment": {"date": "2"}, "runs": {"one": later, "two": record}}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
