"""The worker of all stages and runs: it is made anew for other settings only, and errors leave nothing wrong behind."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from storage.unit_store import UnitAddress, UnitStore
from tests.errors import raises
from workers import hub_snapshot, shared_worker
from workers.kept_pipeline import full_precision, let_go
from workers.messages import Progress, UnitOutput
from workers.sharding import Sharding
from workers.shared_worker import SharedUnit, SharedWorker

NOWHERE = UnitAddress(Path("nowhere"), Path("nowhere"), "idle", "unit", "f")


@dataclass(frozen=True)
class Settings:
    name: str
    numbers: tuple[int, ...]


class Plain:
    """A worker as the stages have them; counts its constructions."""

    made: ClassVar[list[str]] = []

    def __init__(self, settings: Settings) -> None:
        if settings.name == "impossible":
            raise ValueError("no such model")
        self._settings = settings
        Plain.made.append(settings.name)

    def run(self, unit: int, progress: Callable[[int, int], None], store: UnitStore) -> UnitOutput:
        progress(1, 1)
        return UnitOutput({self._settings.name: unit + sum(self._settings.numbers)}, "cpu", 0)


def test_fetching_a_model_may_take_longer_than_loading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose model is still on its way reports progress beyond `LOADING_S`."""
    for name in ("LOADING_S", "_REPORT_INTERVAL_S"):
        monkeypatch.setattr(shared_worker, name, 0.001)
    reported: list[tuple[int, int]] = []
    enough = threading.Event()

    class Fetching:
        def __init__(self, settings: None) -> None:
            assert enough.wait(60)

        def run(self, unit: None, progress: Progress, store: UnitStore) -> UnitOutput:
            return UnitOutput({}, "cpu", 0)

    def progress(done: int, total: int) -> None:
        reported.append((done, total))
        if len(reported) == 5:
            enough.set()

    with hub_snapshot.fetching():  # before the reports begin, however slow this thread is
        SharedWorker(None).run(SharedUnit(Fetching, None, None, NOWHERE), progress)
    assert set(reported) == {(0, 1)}


def test_one_worker_as_long_as_the_settings_are_equal() -> None:
    Plain.made.clear()
    worker, calls = SharedWorker(None), []

    def do(name: str, unit: int) -> Any:
        shared = SharedUnit(Plain, Settings(name, (1, 2)), unit, NOWHERE)
        [result] = worker.run(shared, lambda done, total: calls.append((done, total))).result.items()
        return result

    assert [do("a", 1), do("a", 2), do("b", 3), do("a", 4)] == [("a", 4), ("a", 5), ("b", 6), ("a", 7)]
    assert Plain.made == ["a", "b", "a"], "equal settings are the same, whichever object says them"
    assert calls.count((0, 1)) == 3, "a construction shows as progress"
    with raises(ValueError, "no such model"):
        do("impossible", 5)
    assert do("a", 6) == ("a", 9)
    assert Plain.made == ["a", "b", "a", "a"], "what failed took the place of the one before"


@dataclass(frozen=True)
class Opening:
    model: Path
    dtype: torch.dtype
    stage: str


class Opener:
    """Runs nothing; shows the pipeline that it was given."""

    BESIDE_KEPT_PIPELINE = True
    seen: ClassVar[list[weakref.ref[Any]]] = []

    def __init__(self, settings: Opening) -> None:
        device = torch.device("cpu")
        self._pipeline = full_precision(settings.model, device=device, dtype=settings.dtype, sharding=Sharding())

    def run(self, unit: str, progress: Callable[[int, int], None], store: UnitStore) -> UnitOutput:
        Opener.seen.append(weakref.ref(self._pipeline.transformer))
        if unit == "too much":
            raise MemoryError
        return UnitOutput({}, "cpu", 0)


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    Opener.seen.clear()
    let_go()
    yield
    let_go()


@pytest.mark.usefixtures("nothing_kept")
def test_one_pipeline_from_stage_to_stage_until_others_need_the_memory(digits_model: Path) -> None:
    worker = SharedWorker(None)

    def do(stage: str, unit: str = "unit", dtype: torch.dtype = torch.float32) -> weakref.ref[Any]:
        worker.run(SharedUnit(Opener, Opening(digits_model, dtype, stage), unit, NOWHERE), lambda done, total: None)
        return Opener.seen[-1]

    first = do("trajectories")
    assert first() is not None
    assert do("activations")() is first()
    worker.run(SharedUnit(Plain, Settings("distillation", (1,)), 1, NOWHERE), lambda done, total: None)
    gc.collect()
    assert first() is None, "a worker of another kind has all memory"
    second = do("evaluation")
    third = do("evaluation", dtype=torch.bfloat16)
    gc.collect()
    assert second() is None, "never two"
    assert next(third().parameters()).dtype == torch.bfloat16  # type: ignore[union-attr]
    with pytest.raises(MemoryError):
        do("activations", "too much", dtype=torch.bfloat16)
    gc.collect()
    assert third() is None, "nor after a unit that ran out of memory"
