"""What a stage is: its units, what each depends on, and the worker that does them.

A unit begins when what it depends on is done, whatever stage it belongs to. What that is, is said once: by the records that its
fingerprint is made from (`require`). While one is missing, the unit cannot be made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.context import Run
from storage.cache import FORMAT_VERSION, UnitRecord, fingerprint

STAGE_VERSIONS = {
    "trajectories": 3,
    "selection": 1,
    "activations": 1,
    "distillation": 1,
    "refinement": 1,
    "assembly": 1,
    "evaluation": 3,
}
"""Raised when the same inputs give other outputs than before: units of older versions are done again."""


@dataclass(frozen=True)
class StageUnit:
    """One unit, ready to be handed out."""

    name: str
    payload: Any
    """The worker's message."""
    fingerprint: str
    affinity: str = ""
    """Units of one affinity, in one run, read the same model: a worker that has it open goes on with them."""
    shared: bool = False
    """Whether replicas do it, where `workers.sharding` is set: it runs the full-precision model and nothing else, or takes so
    little that no replica should leave for it."""
    in_run: bool = False
    """Whether its files are the run's own, and not the cache's: a checkpoint."""


@dataclass(frozen=True)
class UnitPlan:
    """A unit that may have to wait for others."""

    name: str
    make: Callable[[], StageUnit]
    """Raises `NotDone` while it has to wait."""


class NotDone(LookupError):
    """Units that something depends on are not done."""

    def __init__(self, missing: Iterable[tuple[str, str]]) -> None:
        self.missing = frozenset(missing)
        """Stage and name of each."""
        super().__init__(f"not done: {', '.join(sorted('/'.join(key) for key in self.missing))}")


class Stage(Protocol):
    """One stage of the pipeline."""

    name: str
    title: str
    """For people."""
    worker_class: type[Any]

    def settings(self, run: Run) -> Any:
        """Of every worker of the stage; of units that can be made."""

    def plan(self, run: Run) -> list[UnitPlan]:
        """All units, those first that others of the stage depend on.

        Raises:
            NotDone: which there are depends on these.
        """


def unit(
    stage: str,
    name: str,
    payload: Any,
    depends: dict[str, Any],
    *,
    affinity: str = "",
    shared: bool = False,
    in_run: bool = False,
) -> StageUnit:
    """A unit whose fingerprint covers `depends`, its name, from which it seeds itself, and the versions."""
    versions = {"format": FORMAT_VERSION, "stage": stage, "version": STAGE_VERSIONS[stage]}
    return StageUnit(name, payload, fingerprint({**versions, "unit": name, **depends}), affinity, shared, in_run)


def require(run: Run, stage: str, name: str) -> UnitRecord:
    """The record of a unit that another depends on.

    Raises:
        NotDone: there is none yet.
    """
    return require_all(run, stage, [name])[0]


def require_all(run: Run, stage: str, names: Iterable[str]) -> list[UnitRecord]:
    """The records of several units of a stage that another unit depends on, in order.

    Raises:
        NotDone: with all that are missing.
    """
    records = {name: run.records.read(stage, name) for name in names}
    if missing := [(stage, name) for name, record in records.items() if record is None]:
        raise NotDone(missing)
    return [record for record in records.values() if record is not None]
