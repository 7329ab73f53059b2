"""What goes into a pool and what comes back: units, events, errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unit:
    """One piece of work."""

    name: str
    """Unique among the units of a call."""
    payload: Any
    """What the worker's `run` gets: small and picklable, such as a frozen dataclass; tensors go through files."""
    affinity: str = ""
    """Units of one affinity are best done by one worker, which then has open what they need, such as a model."""
    priority: int = 0
    """Of the units that wait, those of the lowest number are handed out first."""
    prepared: bool = False
    """Its worker has `prepare`: while a unit is at work, the worker is told which one probably follows."""
    single: bool = False
    """Done by a worker of one process, also where the pool's other workers are replicas."""


def resources_in_words(num_cpus: float, num_gpus: float) -> str:
    """Such as "1 CPU and 0 GPUs"."""
    return f"{num_cpus:g} CPU{'s' * (num_cpus != 1)} and {num_gpus:g} GPU{'s' * (num_gpus != 1)}"


def headline(error: str) -> str:
    """The sentence of an error that says what was wrong: its first line, or where an older program wrote a traceback alone,
    the last one."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    if not lines:
        return "no message"
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


@dataclass(frozen=True)
class UnitFailure:
    """Why a unit was set aside."""

    attempts: int
    error: str
    """How the last attempt ended in one line (`headline`); below it the traceback, or what else there is to say."""


class UnitsFailed(RuntimeError):
    """Some units were set aside; all others are finished."""

    def __init__(self, failures: dict[str, UnitFailure], results: dict[str, Any]) -> None:
        self.failures = failures
        """By unit name."""
        self.results = results
        """Of the units that succeeded, by name."""
        shown = list(failures.items())[:3]
        parts = [f"{len(failures)} of {len(failures) + len(results)} units failed: {', '.join(failures)}"]
        parts += [f"{name}, attempt {failure.attempts}: {headline(failure.error)}" for name, failure in shown]
        if len(failures) > len(shown):
            parts.append(f"and {len(failures) - len(shown)} more")
        super().__init__("\n".join(parts))

    def details(self) -> str:
        """All that is known of the failures, tracebacks too."""
        found = self.failures.items()
        return "\n".join(f"--- {name}, attempt {failed.attempts}:\n{failed.error.rstrip()}" for name, failed in found)


class WorkersFailed(RuntimeError):
    """No worker could be started; the units left over were not tried."""


class PoolEvents:
    """What a pool tells while it works, in the driver's thread. Override what you need; an exception stops the pool."""

    def started(self, name: str, worker: str) -> None:
        """A worker, such as `worker-0`, has got the unit `name`."""

    def progress(self, name: str, done: int, total: int) -> None:
        """The worker has called `progress(done, total)`; only the last call of an interval is seen."""

    def finished(self, name: str, result: Any, seconds: float, attempt: int) -> None:
        """The unit is done after `seconds` in the worker's `run`."""

    def failed(self, name: str, attempt: int, error: str, will_retry: bool, *, out_of_memory: bool = False) -> None:
        """An attempt has failed; `error` is as `UnitFailure.error`."""

    def waiting(self, description: str) -> None:
        """No worker has a place in the cluster: what is waited for, whenever that changes."""

    def released(self) -> Sequence[Unit]:
        """Units that may begin only now. Asked for after every unit that is finished or set aside."""
        return ()
