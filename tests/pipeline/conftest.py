"""A finished run of the small model, made once."""

from pathlib import Path

import pytest

from tests.pipeline.small_run import call, small_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an undisturbed run (`run.yaml`, `run/`), made once by two workers. Copy it to change it."""
    folder = tmp_path_factory.mktemp("finished")
    done = call("run", str(small_run(folder, workers={"num_workers": 2})))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
