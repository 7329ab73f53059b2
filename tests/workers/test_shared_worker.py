"""The worker of all stages and runs: it is made anew for other settings only, and errors leave nothing wrong behind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from workers.messages import UnitOutput
from workers.shared_worker import SharedUnit, SharedWorker


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

    def run(self, unit: int, progress: Callable[[int, int], None]) -> UnitOutput:
        progress(1, 1)
        return UnitOutput((), {self._settings.name: unit + sum(self._settings.numbers)}, "cpu", 0)


def test_one_worker_as_long_as_the_settings_are_equal() -> None:
    Plain.made.clear()
    worker, calls = SharedWorker(None), []

    def do(name: str, unit: int) -> Any:
        shared = SharedUnit(Plain, Settings(name, (1, 2)), unit)
        [result] = worker.run(shared, lambda done, total: calls.append((done, total))).result.items()
        return result

    assert [do("a", 1), do("a", 2), do("b", 3), do("a", 4)] == [("a", 4), ("a", 5), ("b", 6), ("a", 7)]
    assert Plain.made == ["a", "b", "a"], "equal settings are the same, whichever object says them"
    assert calls.count((0, 1)) == 3, "a construction shows as progress"
    with pytest.raises(ValueError, match="no such model"):
        do("impossible", 5)
    assert do("a", 6) == ("a", 9)
    assert Plain.made == ["a", "b", "a", "a"], "what failed took the place of the one before"
