"""Which program made a run: its commit, and the versions of what decides numbers. Imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Versions and commit of this program; in a submitted job, where there is no git, the commit comes with the job."""
    packages = ("torch", "diffusers", "transformers", "ray", "zarr", "safetensors", "numpy")
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit or os.environ.get("REELQUANT_COMMIT"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }
