"""Every study in configs/ can be planned as it stands."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.study.command import plan_study
from tests.pipeline.small_run import ROOT

STUDIES = sorted(path for path in (ROOT / "configs" / "studies").glob("*.yaml") if path.name != "base.yaml")


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_is_feasible(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = io.StringIO()
    assert plan_study(study, (), Console(file=said, width=200)), said.getvalue()
    assert "problem:" not in said.getvalue()
