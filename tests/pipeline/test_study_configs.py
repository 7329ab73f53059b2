"""Every study in configs/ can be planned as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.small_run import ROOT, call

STUDIES = sorted(path for path in (ROOT / "configs" / "studies").glob("*.yaml") if path.name != "base.yaml")


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_is_feasible(study: Path) -> None:
    done = call("study", str(study), "--plan")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing known beforehand is in the way" in done.stdout
