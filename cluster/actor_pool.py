"""Hand units of work to worker processes, one at a time each, and survive what happens to them.

| what happens | what is done |
|---|---|
| the process dies, or Ray loses sight of it | it is ended for certain, its unit goes to another or new process |
| no `progress` for `stall_timeout_s` | the same: Ray itself never notices a process that hangs |
| the worker raises | the same: after a CUDA error a process is of no more use |
| the worker raises ValueError | the unit is set aside at once, the process goes on |
| the worker raises MemoryError | the unit again in the same process, told to save memory; then in a new one; then set aside |
| any of it happens to a rank of a replica | all ranks are ended; the units under way are tried again, each alone |
| a unit fails `max_attempts` times | it is set aside, the others are finished, then `UnitsFailed` names it |
| a worker cannot be started `max_attempts` times in a row | its slot is closed; when all are: `WorkersFailed` |

Ray's own restarts and retries are off: they re-run old calls out of order, and a poison unit without end. A unit may
run twice, never twice at the same time on one machine: what it writes must be atomic and the same every time.

A worker of several ranks is a replica: its processes hold one thing together and wait for each other. It takes a round of
units, one a rank; where there are fewer, the ranks left over shadow the first, and the next round begins when all are done.

Units may come while others are at work (`PoolEvents.released`). Processes come and go with what waits (`cluster.crew`).
"""

from collections.abc import Sequence
from typing import Any

from cluster.crew import Crew
from cluster.pool_limits import PoolLimits, check_arguments, room
from cluster.session import active_session
from cluster.unit_actor import Worker
from cluster.unit_pool import UnitPool
from cluster.units import PoolEvents, Unit, UnitFailure, UnitsFailed, WorkersFailed
from cluster.worker_slot import WorkerRecipe

__all__ = ["PoolEvents", "Unit", "UnitFailure", "UnitsFailed", "WorkersFailed", "run_units"]


def run_units(
    worker_class: type[Worker],
    settings: Any,
    units: Sequence[Unit],
    *,
    num_workers: int,
    num_processes: int | None = None,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    num_ranks: int | None = None,
    max_attempts: int = 3,
    stall_timeout_s: float,
    startup_timeout_s: float = 1800.0,
    placement_timeout_s: float = 1800.0,
    progress_interval_s: float = 0.5,
    idle_timeout_s: float = 60.0,
    events: PoolEvents | None = None,
) -> dict[str, Any]:
    """Do all units on workers `worker_class(settings)` in the open session; return the results by unit name.

    Args:
        worker_class: a class as `cluster.unit_actor.Worker` describes it, or `ReplicaWorker` for a replica;
            importable, or defined in `__main__`.
        settings: what its constructor gets.
        num_workers: at most so many workers; fewer when there are fewer units or a local session has less room.
        num_processes: at most so many processes of all workers, where units are `single` beside replicas; None for as many
            as `num_workers` have.
        num_cpus: CPUs of one rank. Ray sets OMP_NUM_THREADS to it where the environment has none.
        num_gpus: GPUs of one rank, a fraction to share one; Ray sets CUDA_VISIBLE_DEVICES accordingly.
        num_ranks: processes of one worker that is a replica; None for a worker that is not.
        max_attempts: attempts at a unit, and at starting a worker.
        stall_timeout_s: longest silence of a worker during a unit.
        startup_timeout_s: longest construction of a worker: loading a model, for example.
        placement_timeout_s: longest wait for the first node with room, while no worker is placed at all. A minute where
            the cluster's autoscaler has no node type with room.
        progress_interval_s: how often a busy worker is asked how far it is.
        idle_timeout_s: a worker for which nothing waits ends after so long; sooner where one of the other kind finds no place.

    Raises:
        ValueError: two units of one name, a limit out of range, or a worker that no machine of a local session can hold.
        UnitsFailed: after all other units are finished.
        WorkersFailed: no worker could be started, or none had a place.
    """
    session = active_session()
    check_arguments(units, num_workers, 1 if num_ranks is None else num_ranks, num_cpus=num_cpus, num_gpus=num_gpus)
    limits = PoolLimits(
        max_attempts,
        stall_timeout_s,
        startup_timeout_s,
        placement_timeout_s,
        progress_interval_s,
        idle_timeout_s,
    )
    recipes = {True: WorkerRecipe(worker_class, settings, num_cpus, num_gpus)}
    num_processes = min(num_processes or num_workers * (num_ranks or 1), room(session, recipes[True]))
    most = {True: num_processes}
    if num_ranks is not None:
        recipes[False] = WorkerRecipe(worker_class, settings, num_cpus, num_gpus, num_ranks)
        most[False] = min(num_workers, room(session, recipes[False]))
    crew = Crew(recipes, most, num_processes=num_processes, session=session)
    return UnitPool(crew, units, limits, events or PoolEvents()).run()
