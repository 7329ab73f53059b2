"""README and docs: their figures are those on record, and a nominal density never stands without the effective one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
import yaml

from benchmarks.speed_table import main
from pipeline.config.method import parse_method
from pipeline.study.rows import NOISE_FLOOR
from reelquant.attention.sparse_spec import SparseAttentionSpec
from reelquant.noise_schedule import shifted_levels

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "docs/methods.md", "docs/results.md", "docs/results_appendix.md", "docs/performance.md")


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def quality(study: str, setting: str) -> dict[str, Any]:
    [row] = [row for row in record(study)["table"] if row["setting"] == setting]
    return dict(row)


def test_the_speed_table_is_that_on_record(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(README)
    main(["--page", str(page)])
    assert page.read_text() == README
    floor = quality("study_knobs", NOISE_FLOOR)["velocity_sqnr_db"]
    assert f"another attention backend in bf16 has {floor:.1f} dB" in " ".join(README.split())


def test_the_loading_example_writes_a_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's lines, but on a CPU, with a small checkpoint and fewer and smaller frames."""
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    checkpoint = ROOT / "tests" / "fixtures" / "run-1-checkpoint-2" / "checkpoint"
    changes = {
        '"runs/my-run/checkpoint"': repr(str(checkpoint)), '"cuda"': '"cpu"', "height=720": "height=48",
        "width=1280": "width=64", "num_frames=61": "num_frames=5", "num_inference_steps=50": "num_inference_steps=2",
    }  # fmt: skip
    for there, here in changes.items():
        assert there in example
        example = example.replace(there, here)
    exec(compile(example, "README.md", "exec"), {})
    assert iio.imread(tmp_path / "cat.mp4", plugin="pyav").shape == (5, 48, 64, 3)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 80


def test_the_first_screen_says_what_was_never_measured() -> None:
    first = " ".join(README.split("\n## ")[0].split())
    assert "Quality was measured on a small model only" in first
    assert "never measured on downloaded weights" in first


def test_the_projected_distillation_is_that_on_record() -> None:
    """Both pages give the hours that distillation_time.json's table gives."""
    hours = re.findall(r"\| (none|both) \| all \| (\d\.\d\d) \|", (ROOT / "docs" / "performance.md").read_text())
    (_, without), (_, with_both) = hours
    prose = " ".join((ROOT / "docs" / "results_appendix.md").read_text().split())
    assert f"{without} GPU-hours without attention terms, {with_both} with both" in prose


def paragraphs(text: str) -> list[str]:
    """Prose: code, tables and what is made from the records left out, list items apart."""
    text = re.sub(r"```.*?```|<!-- (\w+) -->.*?<!-- /\1 -->|`[^`\n]*`", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n- |\n#", "\n".join(lines)) if part.strip()]


LEVELS = shifted_levels(50)
NOMINAL = re.compile(r"\b(?:10|15|25|40) %[^.;:]*(?:attention|density|sparse step|band)|W4A8(?: and|,) \d+ %")
EFFECTIVE = re.compile(r"effective|of (?:the|all|a schedule's) pairs|\(\d\d\.\d %")


@pytest.mark.parametrize("page", PAGES)
def test_a_nominal_density_stands_beside_the_effective_one(page: str) -> None:
    sections = re.split(r"\n#+ ", (ROOT / page).read_text())
    # A section's own table has the column.
    without = [section for section in sections if "| effective density |" not in section]
    alone = [
        part for text in without for part in paragraphs(text) if NOMINAL.search(part) and not EFFECTIVE.search(part)
    ]
    assert alone == []


def test_a_nominal_density_alone_is_found() -> None:
    for text in ("HunyuanVideo at 720p, W4A8 and 15 % attention: 2.1 s a step", "with 25 % density it is faster"):
        assert NOMINAL.search(text)
        assert not EFFECTIVE.search(text)


def test_the_sparse_example_says_its_effective_density() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    [example] = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "density:" in block]
    attention = parse_method(yaml.safe_load(example)["method"]).attention
    spec = SparseAttentionSpec.of(attention, noise_levels=LEVELS, blocks=())
    num_sparse = spec.schedule(LEVELS).count("sparse")
    effective = 1 - num_sparse / len(LEVELS) * (1 - attention.density)
    assert f"effective density here: {100 * effective:.0f} % of 50 steps" in example
