from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.harness import (
    Recorder,
    markdown,
    parser,
    repeated,
    settings_of,
    timed,
    visible_gpus,
    write_json,
    write_record,
    write_table,
)
from tests.errors import names, raises

CPU = torch.device("cpu")


def test_visible_gpus_are_those_that_the_process_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,GPU-0a")
    assert visible_gpus(2) == ["5", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(3) == ["0", "1", "2"]
    with raises(SystemExit, 4, 3, "CUDA_VISIBLE_DEVICES"):
        visible_gpus(4)


def test_a_record_has_where_it_was_made_and_with_which_settings(tmp_path: Path) -> None:
    given = parser("What it measures.", device=True)
    given.add_argument("--repeats", type=int, default=3)
    output = tmp_path / "deeper" / "result.json"
    options = given.parse_args(["--device", "cpu", "--output", str(output)])
    written = write_record(output, CPU, settings_of(options), rows=[1, 2])
    assert json.loads(output.read_bytes()) == written
    assert written["settings"] == {"repeats": 3}
    assert written["rows"] == [1, 2]
    assert names(written["environment"]["device"], "cpu")
    assert written["environment"]["torch"] == torch.__version__


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": CPU})
    assert json.loads(path.read_bytes()) == {"old": 1}


def test_what_fails_and_what_comes_too_late_is_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    record = Recorder(1e9)
    record.add({"case": "good"}, lambda: {"ms": 1.5})
    record.add({"case": "bad"}, lambda: {"ms": 1 / 0})
    record.budget_s = -1.0
    record.add({"case": "late"}, lambda: {"ms": 1.5})
    good, bad, late = record.rows
    assert good["ms"] == 1.5
    assert names(bad["error"], "ZeroDivisionError")
    assert set(late) == {"case", "skipped"}
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_every_run_counts_but_the_first() -> None:
    calls: list[int] = []
    row = repeated(lambda: calls.append(1), CPU, repeats=4)
    assert len(calls) == 5
    assert len(row["all_s"]) == 4
    assert row["min_s"] <= row["median_s"] <= row["max_s"]
    assert row["peak_bytes"] is None
    assert set(timed(lambda: calls.append(1), CPU)) == {"ms", "ms_20", "ms_80"}


def test_a_table_goes_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Before\n<!-- times -->\nold\n<!-- /times -->\nafter\n")
    for _ in range(2):
        write_table(page, "times", markdown(("case", "ms"), [["one", "1.5"]]))
    assert page.read_text() == (
        "# Before\n<!-- times -->\n| case | ms |\n|---|---|\n| one | 1.5 |\n<!-- /times -->\nafter\n"
    )
    with raises(ValueError, page, "<!-- other -->", "<!-- /other -->"):
        write_table(page, "other", "")
