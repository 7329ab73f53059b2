"""The wheel holds the library and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_wheel_holds_only_the_library(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "reelquant").rglob("*.py")}
    assert sources <= names
    assert {name.split("/")[0] for name in names - metadata} == {"reelquant"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
