"""The import rules of pyproject.toml hold, and each of them would notice its breach."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ALLOWED = {
    "reelquant": ["torch", "safetensors", "diffusers", "numpy"],
    "storage": ["zarr"],
    "cluster": ["ray"],
    "workers": ["reelquant", "storage", "zarr"],
    "pipeline": ["reelquant", "storage", "cluster", "workers", "ray"],
}
"""What each package may import of ours, and a few packages of others."""

OURS_FORBIDDEN = [
    (importer, imported)
    for importer, allowed in ALLOWED.items()
    for imported in ALLOWED
    if imported != importer and imported not in allowed
]
RAY_FORBIDDEN = [("workers", "ray"), ("storage", "ray")]
LIBRARY_FORBIDDEN = [("reelquant", name) for name in ("ray", "zarr", "pydantic", "transformers", "accelerate")]


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    return subprocess.run([program, "--no-cache"], cwd=directory, capture_output=True, text=True, check=False)


def write_packages(directory: Path, imports: dict[str, list[str]]) -> None:
    """The five packages, each importing inside a function, where a rule is most easily broken unseen."""
    shutil.copy(ROOT / "pyproject.toml", directory)
    for package, names in imports.items():
        (directory / package).mkdir()
        (directory / package / "__init__.py").touch()
        lines = ["def run() -> None:", *(f"    import {name}" for name in names), "    return None", ""]
        (directory / package / "job.py").write_text("\n".join(lines))


def test_checkout_keeps_its_import_rules() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_every_allowed_import_passes(tmp_path: Path) -> None:
    write_packages(tmp_path, ALLOWED)
    result = lint_imports(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("importer", "imported"), OURS_FORBIDDEN + RAY_FORBIDDEN + LIBRARY_FORBIDDEN)
def test_forbidden_import_is_found(tmp_path: Path, importer: str, imported: str) -> None:
    write_packages(tmp_path, ALLOWED | {importer: [*ALLOWED[importer], imported]})
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{importer}.job -> {imported}" in result.stdout


def test_ray_behind_an_allowed_import_is_found(tmp_path: Path) -> None:
    write_packages(tmp_path, ALLOWED)
    (tmp_path / "storage" / "remote.py").write_text("import ray\n")
    (tmp_path / "workers" / "job.py").write_text("import storage.remote\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "storage.remote -> ray" in result.stdout
