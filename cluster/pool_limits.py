"""What a pool is asked for, checked before it starts: how long, how often, and whether there is room."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from cluster.session import Session
from cluster.units import Unit, resources_in_words
from cluster.worker_slot import WorkerRecipe


@dataclass(frozen=True)
class PoolLimits:
    """As `cluster.actor_pool.run_units` describes them."""

    max_attempts: int
    stall_timeout_s: float
    startup_timeout_s: float
    placement_timeout_s: float
    progress_interval_s: float
    idle_timeout_s: float

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}: at least 1 is needed")
        seconds = {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_s")}
        if short := [f"{name} is {value}" for name, value in seconds.items() if value <= 0]:
            raise ValueError(f"{', '.join(short)}: more than 0 seconds are needed")


def room(session: Session, recipe: WorkerRecipe) -> int:
    """How many workers a local session holds; an existing cluster may grow, so it sets no limit."""
    if not session.local:
        return 2**31
    held, num_ranks = session.capacity(num_cpus=recipe.num_cpus, num_gpus=recipe.num_gpus), recipe.num_ranks or 1
    if held < num_ranks:
        raise ValueError(
            f"a worker asks for {recipe.size_in_words()}, this session has "
            f"{resources_in_words(session.num_cpus, session.num_gpus)}: ask for less, or use a session with more"
        )
    return held // num_ranks


def check_arguments(
    units: Sequence[Unit], num_workers: int, num_ranks: int, *, num_cpus: float, num_gpus: float
) -> None:
    """Raises ValueError for two units of one name and for numbers out of range."""
    names = [unit.name for unit in units]
    doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubled:
        raise ValueError(f"unit names must be unique, these are not: {', '.join(doubled)}")
    if num_workers < 1 or num_ranks < 1:
        raise ValueError(f"num_workers is {num_workers} and num_ranks {num_ranks}: at least 1 is needed")
    if num_cpus < 0 or num_gpus < 0 or (num_gpus > 1 and num_gpus != int(num_gpus)):
        raise ValueError(f"num_cpus is {num_cpus} and num_gpus {num_gpus}: >= 0, and whole GPUs above one")
