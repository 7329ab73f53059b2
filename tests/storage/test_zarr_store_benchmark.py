import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_benchmark_runs_and_checks_what_it_reads(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.zarr_store", "--quick", "--repeats", "1", "--output", str(output)]
    subprocess.run([*command, "--directory", str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=120)
    document = json.loads(output.read_bytes())
    (phases,) = document["results"].values()
    assert phases.keys() == {"write", "read_warm", "read_cold"}
    for contenders in phases.values():
        assert contenders.keys() == {"plain", "store"}
        assert all(row["median_mb_per_s"] > 0 for row in contenders.values())
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
