"""The performance page equals its records; without records it says so."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.performance_page import SECTIONS, main, points
from benchmarks.roofline import LABELS

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def test_the_page_shows_what_was_recorded(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(PAGE.read_text())
    main(["--page", str(page)])
    assert page.read_text() == PAGE.read_text()
    drawn = (tmp_path / "roofline.svg").read_text()
    # The bytes depend on the release of matplotlib; what is drawn does not.
    shipped = (PAGE.parent / "roofline.svg").read_text()
    assert [drawn.count(text) == shipped.count(text) > 0 for text in ("<text", "<use")] == [True, True]


def test_without_records_nothing_is_said_to_be_measured(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(PAGE.read_text())
    main(["--page", str(page), "--results", str(tmp_path)])
    assert page.read_text().count("Not measured.") == len(SECTIONS)


def test_every_label_of_the_roofline_has_its_point() -> None:
    found = points(RESULTS)
    assert set(LABELS) <= {point.name for point in found}
    assert all(point.intensity > 0 and point.rate > 0 for point in found)
