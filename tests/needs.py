"""Programs and packages that a test needs and that not every machine has."""

import importlib.util
import os
import shutil
from typing import NoReturn

import pytest


def need_program(name: str, *, package: str) -> None:
    """Skips the test where the program is not installed."""
    if shutil.which(name) is None:
        lacking(f"{name} is not installed (Debian: apt-get install {package})")


def need_module(name: str, *, extra: str) -> None:
    """Skips the test where the Python package is not installed."""
    if importlib.util.find_spec(name) is None:
        lacking(f"{name} is not installed (pip install -e '.[{extra}]')")


def lacking(reason: str) -> NoReturn:
    """Skips the test; fails it in CI, which has to have everything."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
