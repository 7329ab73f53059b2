"""Makes or refreshes .venv: `python3 tools/setup_environment.py [--extras application,dev]`. Standard library only.

Does nothing when the environment already holds what pyproject.toml asks for: .venv/setup.json, written last, says what
was installed, and only a change of dependencies, not of a tool's settings, makes it stale. On a machine without a GPU
torch goes first, so that the packages after it find it there and none pulls a second, CUDA-sized one.
"""

# Runs under the caller's python3, whatever its age. An old one must get as far as the check: no syntax newer than 3.6.
import sys

OLDEST_PYTHON = (3, 11)
if sys.version_info < OLDEST_PYTHON:
    sys.exit(
        "reelquant needs Python 3.11 or newer, and {} is {}.{}: name another, `make setup PYTHON=python3.12`".format(
            sys.executable, *sys.version_info[:2]
        )
    )

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import time
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
INTERPRETER = ENVIRONMENT / "bin" / "python"
STAMP = ENVIRONMENT / "setup.json"
CPU_TORCH = "torch==2.13.0"
"""The release that machines without a GPU are tested with."""


def main() -> None:
    """Bring .venv to the state pyproject.toml asks for, with one printed line a step."""
    parser = argparse.ArgumentParser(description="Make or refresh .venv.")
    parser.add_argument("--extras", default="application,dev", help="optional dependencies of pyproject.toml, by comma")
    requested = {extra for extra in parser.parse_args().extras.replace(" ", "").split(",") if extra}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    unknown = requested - set(project["project"]["optional-dependencies"])
    if unknown:
        known = ", ".join(sorted(project["project"]["optional-dependencies"]))
        sys.exit(f"no such extra in pyproject.toml: {', '.join(sorted(unknown))}; there are {known}")

    usable = interpreter_works()
    digest = dependency_digest(project)
    installed = read_stamp() if usable else None
    if installed is not None and installed["digest"] == digest and requested <= set(installed["extras"]):
        return
    if installed is not None:
        requested |= set(installed["extras"])

    started = time.monotonic()
    if not usable:
        announce(f"virtual environment .venv with Python {sys.version.split()[0]}")
        create_environment()
    if not has_gpu() and not has_torch():
        announce(f"{CPU_TORCH} (no GPU here)")
        pip("install", CPU_TORCH)
    names = ",".join(sorted(requested))
    announce(f"reelquant[{names}], editable")
    pip("install", "--editable", f"{ROOT}[{names}]" if names else str(ROOT))
    announce("do the installed packages agree?")
    pip("check")
    write_stamp(digest, requested)
    announce(f"done in {time.monotonic() - started:.0f} s")


def announce(step: str) -> None:
    print(f"set-up: {step}", flush=True)


def interpreter_works() -> bool:
    """Whether .venv holds a Python that runs, is new enough and has pip: an interrupted set-up leaves half of one."""
    if not INTERPRETER.exists():
        return False
    probe = f"import pip, sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    return subprocess.run([INTERPRETER, "-c", probe], capture_output=True, check=False).returncode == 0


def create_environment() -> None:
    try:
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{sys.executable} cannot make a virtual environment with pip: {error}\n"
            "On Debian and Ubuntu the package python3-venv is missing; elsewhere try `make setup PYTHON=...`"
        ) from error


def has_gpu() -> bool:
    """Whether nvidia-smi lists a device."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    listing = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def has_torch() -> bool:
    probe = "import importlib.metadata as m; m.version('torch')"
    return subprocess.run([INTERPRETER, "-c", probe], capture_output=True, check=False).returncode == 0


def pip(*arguments: str) -> None:
    """Run pip of .venv. Of its output only errors pass through; every ten seconds a line says that it is at work.

    Raises:
        SystemExit: pip failed.
    """
    command = [str(INTERPRETER), "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input", *arguments]
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL) as process:
        while True:
            try:
                status = process.wait(timeout=10)
                break
            except subprocess.TimeoutExpired:
                announce(f"pip {arguments[0]} at work, {time.monotonic() - started:.0f} s")
    if status:
        raise SystemExit(f"set-up failed: {' '.join(command)} (exit status {status})")


def dependency_digest(project: dict[str, Any]) -> str:
    """What of pyproject.toml, and of this file, decides what gets installed."""
    parts = {"build-system": project["build-system"], "project": project["project"], "torch": CPU_TORCH}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_stamp() -> dict[str, Any] | None:
    if not STAMP.exists():
        return None
    stamp: dict[str, Any] = json.loads(STAMP.read_text(encoding="utf-8"))
    return stamp


def write_stamp(digest: str, extras: set[str]) -> None:
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps({"digest": digest, "extras": sorted(extras)}, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, STAMP)


if __name__ == "__main__":
    main()
