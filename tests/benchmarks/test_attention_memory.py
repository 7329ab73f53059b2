import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.attention_memory import main
from tests.errors import names

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--tokens", "300", "--heads", "2", "--head-dim", "16", "--stride", "32", "--salient", "8"]


@pytest.mark.slow
def test_main_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deeper" / "result.json"
    main([*SMALL, "--device", "cpu", "--repeats", "2", "--output", str(output)])
    document = json.loads(output.read_bytes())
    assert list(document["results"]) == [
        "column sums",
        "targets",
        "global loss",
        "local loss",
        "dense forward",
        "dense forward and backward",
    ]
    for row in document["results"].values():
        assert row["peak_bytes"] is None
        assert len(row["all_s"]) == 2
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
    assert document["settings"]["tokens"] == 300
    assert document["environment"]["torch"]
    printed = capsys.readouterr().out
    assert "| local loss | not measured |" in printed
    assert "memory is measured on CUDA alone" in printed


@pytest.mark.slow
def test_runs_where_only_torch_is(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from benchmarks.attention_memory import main\n"
        f"main({[*SMALL, '--device', 'cpu', '--repeats', '1', '--output', str(output)]!r})\n"
        "assert not any(name in sys.modules for name in ('ray', 'zarr', 'safetensors'))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert output.is_file()


def test_sizes_must_be_positive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tokens", "0", "--output", str(tmp_path / "result.json")])
    assert names(capsys.readouterr().err, "--tokens 0")
