"""Which program made a run: its commit, and the versions of what decides numbers. Imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

TRANSFORMERS = "num_transformers"
"""Key of a run's provenance: transformers of its pipeline, one where it is not there."""


def provenance() -> dict[str, Any]:
    """Versions and commit of this program; in a submitted job, where there is no git, the commit comes with the job."""
    packages = ("torch", "diffusers", "transformers", "ray", "zarr", "safetensors", "numpy")
    return {
        "commit": commit() or os.environ.get("REELQUANT_COMMIT"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def commit() -> str | None:
    """Hash of this checkout's commit, with `-dirty` where tracked files differ from it; None without a checkout or git."""
    root = Path(__file__).resolve().parents[1]
    describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None
