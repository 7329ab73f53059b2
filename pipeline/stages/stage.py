"""What a stage is: its units, what each depends on, and the worker that does them.

A unit begins when what it depends on is done, whatever stage it belongs to. What that is, is said once: by the records that its
fingerprint is made from (`require`). While one is missing, the unit cannot be made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.context import Run
from storage.manifest import UnitRecord, fingerprint

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
    stage: str, name: str, payload: Any, depends: dict[str, Any], *, affinity: str = "", shared: bool = False
) -> StageUnit:
    """A unit whose fingerprint covers `depends` and the stage's version."""
    covered = fingerprint({"stage": stage, "version": STAGE_VERSIONS[stage], **depends})
    return StageUnit(name, payload, covered, affinity, shared)


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
    records = {name: run.manifest.read(stage, name) for name in names}
    if missing := [(stage, name) for name, record in records.items() if record is None]:
        raise NotDone(missing)
    return [record for record in records.values() if record is not None]


def known_units(stage: Stage, run: Run) -> list[StageUnit]:
    """The units of a stage that can be made from the records there are."""
    units = []
    try:
        plans = stage.plan(run)
    except NotDone:
        return []
    for plan in plans:
        try:
            units.append(plan.make())
        except NotDone:
            continue
    return units
