"""Arrays are there before they are asked for, within the memory set apart; errors are those of reading."""

import threading
from pathlib import Path

import pytest
import torch

from storage.calibration_store import CalibrationStore, DamagedArray
from tests.errors import raises
from workers.read_ahead import ReadAhead

NAMES = [f"activations/sample-{index}/block" for index in range(4)]
ARRAY_BYTES = 4 * 1000


@pytest.fixture
def store(tmp_path: Path) -> CalibrationStore:
    store = CalibrationStore(tmp_path / "calibration.zarr")
    for index, name in enumerate(NAMES):
        store.write(name, torch.full((1000,), float(index)))
    return store


def taken(entries: ReadAhead, names: list[str]) -> list[float]:
    return [float(entries.take(name)[0]) for name in names]


def wait(entries: ReadAhead) -> None:
    assert entries._thread is not None
    entries._thread.join(10)


def test_arrays_are_read_meanwhile_and_handed_out_once(store: CalibrationStore) -> None:
    threads = []

    def read(name: str) -> torch.Tensor:
        threads.append(threading.current_thread())
        return store.read(name)

    entries = ReadAhead(read)
    entries.begin(NAMES)
    wait(entries)
    assert taken(entries, NAMES) == [0, 1, 2, 3]
    assert entries.num_ahead == 4
    assert threading.main_thread() not in threads
    assert taken(entries, NAMES[:1]) == [0], "read again"
    assert len(threads) == 5


@pytest.mark.parametrize(("limit_bytes", "num"), [(0, 0), (ARRAY_BYTES - 1, 0), (2 * ARRAY_BYTES, 2), (2**40, 4)])
def test_memory_is_bounded(store: CalibrationStore, limit_bytes: int, num: int) -> None:
    entries = ReadAhead(store.read, limit_bytes=limit_bytes)
    entries.begin(NAMES)
    wait(entries)
    assert taken(entries, NAMES) == [0, 1, 2, 3]
    assert entries.num_ahead == num


def test_what_is_not_wanted_any_more_is_forgotten(store: CalibrationStore) -> None:
    entries = ReadAhead(store.read, limit_bytes=2 * ARRAY_BYTES)
    entries.begin(NAMES[:2])
    wait(entries)
    entries.begin(NAMES[1:])
    wait(entries)
    assert taken(entries, NAMES) == [0, 1, 2, 3]
    assert entries.num_ahead == 2, "the second, which was there, and the third"


def test_a_unit_that_begins_early_stops_the_reading(store: CalibrationStore) -> None:
    second = threading.Event()

    def read(name: str) -> torch.Tensor:
        if name == NAMES[1] and threading.current_thread() is not threading.main_thread():
            second.set()
            assert entries._stopped.wait(200)
        return store.read(name)

    entries = ReadAhead(read)
    entries.begin(NAMES)
    assert second.wait(200)
    entries.stop()
    assert taken(entries, NAMES) == [0, 1, 2, 3]
    assert entries.num_ahead == 2, "the array at hand is the last"


def test_a_damaged_array_is_an_error_of_the_unit_that_takes_it(store: CalibrationStore) -> None:
    entries = ReadAhead(store.read)
    entries.begin([NAMES[0], "activations/gone"])
    wait(entries)
    assert taken(entries, NAMES[:1]) == [0]
    with raises(DamagedArray, "activations/gone"):
        entries.take("activations/gone")
