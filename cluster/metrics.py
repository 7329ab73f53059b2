"""What a driver tells Prometheus through Ray: units, bytes and memory by stage.

Ray's agent on every node serves them, with Ray's own figures, on the node's metrics port; they reach it within Ray's reporting
interval (10 s). They are for looking at: what is done is what the run's records say.
"""

from ray.util.metrics import Counter, Gauge

_TAGS = ("stage",)


class UnitMetrics:
    """Counts since the driver's start. Make one while a session is open."""

    def __init__(self) -> None:
        self._finished = Counter("reelquant_units_finished", "Units done and recorded.", _TAGS)
        self._retries = Counter("reelquant_units_retried", "Attempts that failed at units that were done later.", _TAGS)
        self._set_aside = Counter("reelquant_units_set_aside", "Units given up after all their attempts.", _TAGS)
        self._seconds = Counter("reelquant_unit_seconds", "Seconds of work in the units done.", _TAGS)
        self._bytes = Counter("reelquant_bytes_written", "Bytes of the recorded outputs.", _TAGS)
        self._memory = Gauge("reelquant_peak_memory_bytes", "Largest memory that a unit took.", _TAGS)
        self._largest: dict[str, int] = {}

    def finished(self, stage: str, *, seconds: float, attempt: int, num_bytes: int, peak_memory_bytes: int) -> None:
        """A unit is recorded, at its `attempt`-th attempt."""
        tags = {"stage": stage}
        self._finished.inc(1, tags)
        self._seconds.inc(max(seconds, 1e-9), tags)  # Ray takes no zeros
        if attempt > 1:
            self._retries.inc(attempt - 1, tags)
        if num_bytes > 0:
            self._bytes.inc(num_bytes, tags)
        self._largest[stage] = max(self._largest.get(stage, 0), peak_memory_bytes)
        self._memory.set(self._largest[stage], tags)

    def set_aside(self, stage: str, num: int) -> None:
        """So many units were given up."""
        self._set_aside.inc(num, {"stage": stage})
