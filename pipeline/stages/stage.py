"""What a stage is: its units in order, what each depends on, and the worker that does them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.context import Run
from storage.manifest import UnitRecord, fingerprint

STAGE_VERSIONS = {
    "trajectories": 2,
    "selection": 1,
    "activations": 1,
    "distillation": 1,
    "refinement": 1,
    "assembly": 1,
    "evaluation": 1,
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
    """Whether replicas do it, where `workers.sharding` is set: it runs the full-precision model and nothing else. Equal for all
    units of a wave."""


class Stage(Protocol):
    """One stage of the pipeline."""

    name: str
    title: str
    """For people."""
    worker_class: type[Any]

    def settings(self, run: Run) -> Any:
        """Of every worker of the stage."""

    def waves(self, run: Run) -> list[list[StageUnit]]:
        """All units; those of a wave are independent, and a wave begins when the one before is done."""


def unit(
    stage: str, name: str, payload: Any, depends: dict[str, Any], *, affinity: str = "", shared: bool = False
) -> StageUnit:
    """A unit whose fingerprint covers `depends` and the stage's version."""
    covered = fingerprint({"stage": stage, "version": STAGE_VERSIONS[stage], **depends})
    return StageUnit(name, payload, covered, affinity, shared)


def require(run: Run, stage: str, name: str) -> UnitRecord:
    """The record of a unit of an earlier stage, which is done by now."""
    record = run.manifest.read(stage, name)
    assert record is not None, f"{stage}/{name} is not done"
    return record
