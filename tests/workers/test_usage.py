"""What a unit is said to have taken is what it took."""

import time
from pathlib import Path

from storage.unit_store import UnitAddress, UnitStore
from workers.messages import UnitOutput
from workers.shared_worker import SharedUnit, SharedWorker
from workers.usage import measured


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_time_and_bytes_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(bytes(10**6))
    with measured(load_s=1.5) as meter:
        spin(0.2)
        time.sleep(0.2)
        (tmp_path / "file").write_bytes(bytes(3 * 10**6))
        (tmp_path / "before").read_bytes()
        usage = meter.usage()
    assert usage.load_s == 1.5
    assert usage.seconds >= 0.4
    assert 0.19 <= usage.cpu_s < usage.seconds - 0.1, "sleeping is no work"
    assert 3 * 10**6 <= usage.written_bytes < 4 * 10**6
    assert 10**6 <= usage.read_bytes < 2 * 10**6
    assert usage.disk_s is None or 0 <= usage.disk_s <= usage.seconds
    assert usage.network_bytes is None or usage.network_bytes >= 0


class SlowToMake:
    made = 0

    def __init__(self, settings: None) -> None:
        time.sleep(0.3)
        SlowToMake.made += 1

    def run(self, unit: float, progress: object, store: UnitStore) -> UnitOutput:
        time.sleep(unit)
        return UnitOutput({}, "cpu", 1)


def test_the_construction_of_a_worker_is_told_apart_from_its_unit() -> None:
    worker = SharedWorker(None)
    address = UnitAddress(Path("nowhere"), Path("nowhere"), "idle", "unit", "f")
    unit = SharedUnit(SlowToMake, None, 0.1, address)
    times, usages = [time.perf_counter()], []
    for _ in range(2):
        usages.append(worker.run(unit, lambda done, total: None).usage)
        times.append(time.perf_counter())
    first, second = usages
    assert first is not None
    assert second is not None
    assert first.load_s >= 0.3
    assert first.seconds >= 0.1
    rounding = 2e-3
    assert first.load_s + first.seconds <= times[1] - times[0] + rounding, "no time is in both"
    assert second.seconds >= 0.1
    assert second.load_s + second.seconds <= times[2] - times[1] + rounding
    assert SlowToMake.made == 1
