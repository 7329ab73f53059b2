"""The import rules of pyproject.toml hold, and breaches of them would be found."""

import shutil
import subprocess
import sysconfig
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    return subprocess.run([program, "--no-cache"], cwd=directory, capture_output=True, text=True, check=False)


def test_checkout_keeps_its_import_rules() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Behind functions too, and for types alone."""
    graph = grimp.build_graph("reelquant", "storage", "cluster", "workers", "pipeline", cache_dir=None)
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


def test_breaches_are_found_behind_functions_and_behind_other_imports(tmp_path: Path) -> None:
    """That the rules are read, and that those of packages of others are kept: what each says stands in pyproject.toml."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = next(contract["layers"] for contract in contracts if contract["id"] == "library-floors")
    inside = [module.removeprefix("reelquant.") for floor in floors for module in floor.split(" | ")]
    for package in (
        "reelquant",
        *(f"reelquant/{name}" for name in inside),
        "storage",
        "cluster",
        "workers",
        "pipeline",
    ):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "storage" / "remote.py").write_text("import ray\n")
    (tmp_path / "workers" / "job.py").write_text("import storage.remote\n")
    (tmp_path / "reelquant" / "job.py").write_text("def run() -> None:\n    import workers.job\n")
    (tmp_path / "reelquant" / "quantization" / "linear.py").write_text("import reelquant.checkpoint\n")
    (tmp_path / "reelquant" / "ops" / "linear.py").write_text("import reelquant.quantization\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    for breach in (
        "storage.remote -> ray",
        "reelquant.job -> workers.job",
        "reelquant.quantization.linear -> reelquant.checkpoint",
        "reelquant.ops.linear -> reelquant.quantization",
    ):
        assert breach in result.stdout
