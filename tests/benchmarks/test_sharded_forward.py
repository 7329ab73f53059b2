import json
from pathlib import Path

import pytest

from benchmarks.sharded_forward import main
from tests.errors import raises

SMALL = ["--heads", "1", "--double", "1", "--single", "2", "--layout", "1", "4", "6", "--repeats", "1"]


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deeper" / "result.json"
    main([*SMALL, "--compare", "--folder", str(tmp_path / "model"), "--output", str(output)])
    document = json.loads(output.read_bytes())
    assert len(document["ranks"]) == 2
    for rank in (*document["ranks"], document["whole"]):
        assert rank["load_s"] > 0
        assert len(rank["plain"]["seconds"]) == len(rank["with_hooks"]["seconds"]) == 1
    assert document["relative_differences"] == {"output": 0.0, "latent": 0.0, "block_input": 0.0, "weight_error": 0.0}
    assert document["settings"]["layout"] == [1, 4, 6]
    assert document["checkpoint_bytes"] > 10**6
    assert "| fsdp, 2 ranks |" in capsys.readouterr().out
    with raises(SystemExit, tmp_path / "model"):
        main([*SMALL, "--heads", "2", "--folder", str(tmp_path / "model"), "--output", str(output)])
