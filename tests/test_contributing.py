"""The page for contributors names files that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_paths_of_the_page_are_there() -> None:
    """`<name>` stands for any; what a command is given or what it makes is none of the checkout's."""
    spans = re.findall(r"`([^`\n]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    paths = [span for span in spans if "/" in span and " " not in span and not span.startswith(".venv/")]
    lacking = [path for path in paths if not any(ROOT.glob(re.sub(r"<\w+>", "*", path.rstrip("/"))))]
    assert len(paths) > 10
    assert lacking == []
