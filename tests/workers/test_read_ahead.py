"""Arrays are there before they are asked for, within the memory set apart; errors are those of reading."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from storage.recorded_outputs import DamagedArray, RecordedOutputs
from storage.unit_store import UnitStore
from tests.errors import raises
from tests.unit_cache import UnitCache
from workers.read_ahead import ReadAhead

NAMES = [f"activations/sample-{index}/block" for index in range(4)]
ARRAY_BYTES = 4 * 1000


@pytest.fixture
def store(tmp_path: Path) -> RecordedOutputs:
    cache = UnitCache(tmp_path)
    for index in range(len(NAMES)):
        cache.write("activations", f"sample-{index}", {"block": torch.full((1000,), float(index))})
    return cache.outputs


def taken(entries: ReadAhead, store: RecordedOutputs, names: list[str]) -> list[float]:
    return [float(entries.take(store, name)[0]) for name in names]


def wait(entries: ReadAhead) -> None:
    assert entries._thread is not None
    entries._thread.join(10)


def test_arrays_are_read_meanwhile_and_handed_out_once(store: RecordedOutputs, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, read = [], store.read

    def watched(name: str) -> torch.Tensor:
        threads.append(threading.current_thread())
        return read(name)

    monkeypatch.setattr(store, "read", watched)
    entries = ReadAhead()
    entries.begin(store, NAMES)
    wait(entries)
    assert taken(entries, store, NAMES) == [0, 1, 2, 3]
    assert entries.num_ahead == 4
    assert threading.main_thread() not in threads
    assert taken(entries, store, NAMES[:1]) == [0], "read again"
    assert len(threads) == 5


@pytest.mark.parametrize(("limit_bytes", "num"), [(0, 0), (ARRAY_BYTES - 1, 0), (2 * ARRAY_BYTES, 2), (2**40, 4)])
def test_memory_is_bounded(store: RecordedOutputs, limit_bytes: int, num: int) -> None:
    entries = ReadAhead(limit_bytes=limit_bytes)
    entries.begin(store, NAMES)
    wait(entries)
    assert taken(entries, store, NAMES) == [0, 1, 2, 3]
    assert entries.num_ahead == num


def test_what_is_not_wanted_any_more_is_forgotten(store: RecordedOutputs) -> None:
    entries = ReadAhead(limit_bytes=2 * ARRAY_BYTES)
    entries.begin(store, NAMES[:2])
    wait(entries)
    entries.begin(store, NAMES[1:])
    wait(entries)
    assert taken(entries, store, NAMES) == [0, 1, 2, 3]
    assert entries.num_ahead == 2, "the second, which was there, and the third"


def test_units_of_several_runs_have_the_same_names_and_other_arrays(store: RecordedOutputs, tmp_path: Path) -> None:
    other, record = UnitCache(tmp_path / "other"), store._record_of("activations", "sample-0")
    with UnitStore(replace(other.address("activations", "sample-0"), fingerprint="another")) as writing:
        writing.write(NAMES[0], torch.full((1000,), 9.0))
        outputs = writing.publish()
    assert record is not None
    changed = replace(record, fingerprint="another", attempt=writing.attempt, outputs=outputs)
    others = RecordedOutputs(tmp_path / "other" / "cache", tmp_path / "other", lambda *_: changed)
    entries = ReadAhead()
    entries.begin(store, NAMES[:1])
    wait(entries)
    assert taken(entries, others, NAMES[:1]) == [9]
    assert taken(entries, store, NAMES[:1]) == [0]
    assert entries.num_ahead == 1


def test_a_unit_that_begins_early_stops_the_reading(store: RecordedOutputs, monkeypatch: pytest.MonkeyPatch) -> None:
    second, read_now, entries = threading.Event(), store.read, ReadAhead()

    def read(name: str) -> torch.Tensor:
        if name == NAMES[1] and threading.current_thread() is not threading.main_thread():
            second.set()
            assert entries._stopped.wait(200)
        return read_now(name)

    monkeypatch.setattr(store, "read", read)
    entries.begin(store, NAMES)
    assert second.wait(200)
    entries.stop()
    assert taken(entries, store, NAMES) == [0, 1, 2, 3]
    assert entries.num_ahead == 2, "the array at hand is the last"


def test_a_damaged_array_is_an_error_of_the_unit_that_takes_it(store: RecordedOutputs) -> None:
    entries = ReadAhead()
    entries.begin(store, [NAMES[0], f"{NAMES[1]}/gone"])
    wait(entries)
    assert taken(entries, store, NAMES[:1]) == [0]
    with raises(DamagedArray, f"{NAMES[1]}/gone"):
        entries.take(store, f"{NAMES[1]}/gone")
