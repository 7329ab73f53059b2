import json
from pathlib import Path

import pytest

from benchmarks.driver_overhead import main

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_record_has_a_row_for_the_pool_and_one_for_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deeper" / "result.json"
    main(["--units", "30", "--workers", "1", "--repeats", "1", "--output", str(output)])
    document = json.loads(output.read_bytes())
    assert [(row["kind"], row["num_workers"]) for row in document["results"]] == [("pool", 1), ("run", 1)]
    assert all(0 < row["median_ms_per_unit"] < 100 for row in document["results"])
    assert document["settings"] == {"units": 30, "repeats": 1}
    assert "run, 1 workers: " in capsys.readouterr().out
