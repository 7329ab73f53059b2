"""What Prometheus reads from a session's metrics port."""

import time
from urllib.request import urlopen

import ray

from cluster.metrics import UnitMetrics
from cluster.session import Session


def scrape() -> dict[str, float]:
    """Our samples by name and stage, as Prometheus gets them."""
    [node] = ray.nodes()
    with urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("ray_reelquant_"):
            name, labels = line.split("{", 1)
            stage = labels.split('stage="', 1)[1].split('"', 1)[0]
            found[f"{name.removeprefix('ray_reelquant_')} {stage}"] = float(line.rsplit(" ", 1)[1])
    return found


def test_prometheus_reads_units_bytes_and_memory_by_stage(session: Session) -> None:
    metrics = UnitMetrics()
    metrics.finished("distillation", seconds=2.0, attempt=1, num_bytes=1000, peak_memory_bytes=7_000)
    metrics.finished("distillation", seconds=3.5, attempt=3, num_bytes=200, peak_memory_bytes=5_000)
    metrics.finished("selection", seconds=0.0, attempt=1, num_bytes=0, peak_memory_bytes=0)
    metrics.set_aside("evaluation", 2)
    expected = {
        "units_finished_total distillation": 2.0,
        "units_finished_total selection": 1.0,
        "units_retried_total distillation": 2.0,
        "units_set_aside_total evaluation": 2.0,
        "unit_seconds_total distillation": 5.5,
        "bytes_written_total distillation": 1200.0,
        "peak_memory_bytes distillation": 7000.0,
    }
    deadline, found = time.monotonic() + 200, dict[str, float]()
    while not expected.items() <= found.items() and time.monotonic() < deadline:
        time.sleep(1.0)
        found = scrape()
    assert expected.items() <= found.items(), found
